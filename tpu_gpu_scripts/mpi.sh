#!/usr/bin/env bash
# Trains on machines that Open MPI reaches. The same command again goes on where it was.
#   JAXPAR_HOSTS="node0 node1" tpu_gpu_scripts/mpi.sh CONFIG [key=value …]
# Start it in a folder that all machines see under the same path. Tested with Open MPI 4.1, two ranks on one machine,
# simulated CPU devices; never yet on GPUs, on several machines or with Open MPI 5.
set -euo pipefail

# The cluster. cluster.num_nodes is the number of hosts.
: "${JAXPAR_HOSTS:=node0 node1}" # the first runs the coordinator; the others must know it by this name
: "${JAXPAR_PER_NODE:=1}"        # processes a host: one takes all GPUs; as many as GPUs take one each
: "${JAXPAR_PORT:=12355}"        # the coordinator's: free there, open between the hosts
: "${JAXPAR_START_TIMEOUT:=300}" # seconds in which all processes must be up
: "${JAXPAR_ENV:=$PWD/.venv}"    # a virtual environment's folder

config=${1:?"usage: JAXPAR_HOSTS=\"node0 node1\" mpi.sh CONFIG [key=value …]"}
read -ra hosts <<<"$JAXPAR_HOSTS"
slots=$(printf ",%s:$JAXPAR_PER_NODE" "${hosts[@]}")
processes=$((${#hosts[@]} * JAXPAR_PER_NODE))
# jax's own detection takes mpirun's machine for the coordinator's, and needs mpi4py for Open MPI 5.
export JAX_COORDINATOR_ADDRESS="${hosts[0]}:$JAXPAR_PORT" JAX_NUM_PROCESSES=$processes JAXPAR_PER_NODE
JAXPAR_LOGS="$PWD/jaxpar-$(date +%Y%m%d-%H%M%S)"
export JAXPAR_LOGS JAXPAR_START_TIMEOUT
mkdir "$JAXPAR_LOGS"
# A log for each rank, and not through mpirun, whose pseudo-terminal would get the progress bar.
# shellcheck disable=SC2016 # for the rank's shell to expand
rank='export JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK
  ((JAXPAR_PER_NODE == 1)) || export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
  exec "$@" >"$JAXPAR_LOGS/$JAX_PROCESS_ID.log" 2>&1'

echo "watch: tail -F $JAXPAR_LOGS/0.log; save and stop: Ctrl-C, or kill $$"
# setsid, because mpirun kills its ranks a second after a Ctrl-C: it shall not get it, but SIGUSR1, which it passes on.
# Without --bind-to none each rank would have one core.
setsid mpirun --host "${slots:1}" -np "$processes" --map-by "ppr:$JAXPAR_PER_NODE:node" --bind-to none -wdir "$PWD" \
  -x JAX_COORDINATOR_ADDRESS -x JAX_NUM_PROCESSES -x JAXPAR_PER_NODE -x JAXPAR_LOGS -x JAXPAR_START_TIMEOUT \
  bash -c "$rank" - "$JAXPAR_ENV/bin/jaxpar" train "$config" \
  cluster.num_nodes="${#hosts[@]}" runner.resume_dir=auto "${@:2}" &
job=$!
trap 'signalled=yes; kill -USR1 $job' INT TERM
signalled=yes
while [[ $signalled ]]; do # a signal ends `wait` before the job ends
  signalled=
  status=0
  wait "$job" || status=$?
done
grep -hs '^error: ' "$JAXPAR_LOGS"/*.log | sort -u >&2 || true
exit "$status"
