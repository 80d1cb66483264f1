#!/usr/bin/env bash
# Trains on machines that ssh reaches without a password. The same command again continues where the run stopped.
#   JAXPAR_HOSTS="node0 node1" tpu_gpu_scripts/ssh.sh CONFIG [--model MODULE:NAME] [key=value …]
# Start it in tmux, because it must keep running, in a folder that all machines see under the same path. Tested with
# OpenSSH, both hosts being one machine with simulated CPU devices; not yet run on GPUs or on several machines.
set -euo pipefail

# The cluster: one process on each host uses all its GPUs. cluster.num_nodes is the number of hosts.
: "${JAXPAR_HOSTS:=node0 node1}" # the first one runs the coordinator; the others must be able to resolve its name
: "${JAXPAR_PORT:=12355}"        # the coordinator's port: unused on its host, and open between the hosts
: "${JAXPAR_START_TIMEOUT:=300}" # seconds within which all processes must have started
: "${JAXPAR_ENV:=$PWD/.venv}"    # folder of the virtual environment
: "${JAXPAR_SSH:=ssh -o BatchMode=yes -o ServerAliveInterval=30}"

config=${1:?"usage: JAXPAR_HOSTS=\"node0 node1\" ssh.sh CONFIG [--model MODULE:NAME] [key=value …]"}
read -ra hosts <<<"$JAXPAR_HOSTS"
read -ra ssh <<<"$JAXPAR_SSH"
# Where the processes meet, only those that know it are let in. You may set your own.
: "${JAXPAR_SECRET:=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
logs="$PWD/jaxpar-$(date +%Y%m%d-%H%M%S)"
mkdir "$logs"
printf -v train '%q ' "$JAXPAR_ENV/bin/jaxpar" train "$config" \
  cluster.num_nodes="${#hosts[@]}" runner.resume_dir=auto "${@:2}"

# ssh does not pass signals on. Instead, each process stops when the standard input of its ssh, this pipe, ends: after a
# Ctrl-C, the failure of another process, or a lost connection. Before that it brings the secret, which every user of the
# machine could read on a command line.
exec 3< <(exec tail -f --pid=$$ /dev/null)
pipe=$!
stop() { kill $pipe 2>/dev/null || true; }
trap 'signalled=yes; stop' INT TERM
on() {
  local status=0
  setsid "${ssh[@]}" "$1" bash -c "$(printf %q "$2")" < <(printf '%s\n' "$JAXPAR_SECRET" && exec cat <&3) || status=$?
  ((status == 0)) || stop
  return $status
}

echo "watch: tail -F $logs/0.log; save and stop: Ctrl-C, or kill $$"
jobs=()
for process in "${!hosts[@]}"; do
  variables="JAX_COORDINATOR_ADDRESS=${hosts[0]}:$JAXPAR_PORT JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$process"
  variables+=" JAXPAR_START_TIMEOUT=$JAXPAR_START_TIMEOUT"
  run="$variables $train >${logs@Q}/$process.log 2>&1"
  on "${hosts[process]}" \
    "IFS= read -r JAXPAR_SECRET; export JAXPAR_SECRET; cd ${PWD@Q} || exit
    $run & job=\$!; exec 3<&0; { cat <&3; kill \$job; } >/dev/null 2>&1 & wait \$job" &
  jobs+=($!)
done

result=0
for job in "${jobs[@]}"; do
  signalled=yes
  while [[ $signalled ]]; do # a signal makes `wait` return before the job ends
    signalled=
    status=0
    wait "$job" || status=$?
  done
  ((status == 0)) || result=$status
done
stop
grep -hs '^error: ' "$logs"/*.log | sort -u >&2 || true
exit "$result"
