#!/usr/bin/env bash
# Trains on machines that Open MPI can reach. The same command again continues where the run stopped.
#   JAXPAR_HOSTS="node0 node1" tpu_gpu_scripts/mpi.sh CONFIG [--model MODULE:NAME] [key=value …]
# Start it in a folder that all machines see under the same path. Tested with Open MPI 4.1, two ranks on one machine
# and simulated CPU devices; not yet run on GPUs, on several machines or with Open MPI 5.
set -euo pipefail

# The cluster. cluster.num_nodes is the number of hosts.
: "${JAXPAR_HOSTS:=node0 node1}" # the first one runs the coordinator; the others must be able to resolve its name
: "${JAXPAR_PER_NODE:=1}"        # processes per host: a single one uses all GPUs; with one per GPU, each uses one
: "${JAXPAR_PORT:=12355}"        # the coordinator's port: unused on its host, and open between the hosts
: "${JAXPAR_START_TIMEOUT:=300}" # seconds within which all processes must have started
: "${JAXPAR_ENV:=$PWD/.venv}"    # folder of the virtual environment

config=${1:?"usage: JAXPAR_HOSTS=\"node0 node1\" mpi.sh CONFIG [--model MODULE:NAME] [key=value …]"}
read -ra hosts <<<"$JAXPAR_HOSTS"
slots=$(printf ",%s:$JAXPAR_PER_NODE" "${hosts[@]}")
processes=$((${#hosts[@]} * JAXPAR_PER_NODE))
# jax's own detection assumes that the coordinator runs on the machine of mpirun, and needs mpi4py for Open MPI 5.
export JAX_COORDINATOR_ADDRESS="${hosts[0]}:$JAXPAR_PORT" JAX_NUM_PROCESSES=$processes JAXPAR_PER_NODE
# Where the processes meet, only those that know it are let in. You may set your own.
: "${JAXPAR_SECRET:=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
JAXPAR_LOGS="$PWD/jaxpar-$(date +%Y%m%d-%H%M%S)"
export JAXPAR_LOGS JAXPAR_START_TIMEOUT JAXPAR_SECRET
mkdir "$JAXPAR_LOGS"
# Each rank writes its own log. Through mpirun's pseudo-terminal, it would print the progress bar.
# shellcheck disable=SC2016 # the rank's shell expands it
rank='export JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK
  ((JAXPAR_PER_NODE == 1)) || export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
  exec "$@" >"$JAXPAR_LOGS/$JAX_PROCESS_ID.log" 2>&1'

echo "watch: tail -F $JAXPAR_LOGS/0.log; save and stop: Ctrl-C, or kill $$"
# setsid hides a Ctrl-C from mpirun, which would kill its ranks a second later. Instead, mpirun gets SIGUSR1 and passes
# it on. Without --bind-to none, each rank would get only one core.
setsid mpirun --host "${slots:1}" -np "$processes" --map-by "ppr:$JAXPAR_PER_NODE:node" --bind-to none -wdir "$PWD" \
  -x JAX_COORDINATOR_ADDRESS -x JAX_NUM_PROCESSES -x JAXPAR_SECRET -x JAXPAR_START_TIMEOUT -x JAXPAR_PER_NODE \
  -x JAXPAR_LOGS \
  bash -c "$rank" - "$JAXPAR_ENV/bin/jaxpar" train "$config" \
  cluster.num_nodes="${#hosts[@]}" runner.resume_dir=auto "${@:2}" &
job=$!
trap 'signalled=yes; kill -USR1 $job' INT TERM
signalled=yes
while [[ $signalled ]]; do # a signal makes `wait` return before the job ends
  signalled=
  status=0
  wait "$job" || status=$?
done
grep -hs '^error: ' "$JAXPAR_LOGS"/*.log | sort -u >&2 || true
exit "$status"
