#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice, with jax[tpu] on its hosts. The same command again continues where the run stopped.
#   JAXPAR_TPU=my-v5e-16 JAXPAR_NODES=4 tpu_gpu_scripts/tpu_pod.sh CONFIG [--model MODULE:NAME] [key=value …]
# Not yet run on a TPU: only its commands are tested, with a stand-in for gcloud.
set -euo pipefail

# The cluster. The hosts find each other through jax, which reads Google's metadata.
: "${JAXPAR_TPU:=my-tpu}"
: "${JAXPAR_ZONE:=us-central1-a}"
: "${JAXPAR_NODES:=4}"       # number of hosts in the slice: a v5litepod-16 has 4
: "${JAXPAR_FOLDER:=jaxpar}" # on each host; output_dir must be a folder that all hosts share (NFS, gcsfuse)
: "${JAXPAR_ENV:=.venv}"     # folder of the virtual environment there

config=${1:?"usage: JAXPAR_TPU=NAME JAXPAR_NODES=N tpu_pod.sh CONFIG [--model MODULE:NAME] [key=value …]"}
on() { gcloud compute tpus tpu-vm ssh "$JAXPAR_TPU" --zone="$JAXPAR_ZONE" --worker="$1" --command="$2"; }
printf -v train '%q ' "$JAXPAR_ENV/bin/jaxpar" train "$config" \
  cluster.num_nodes="$JAXPAR_NODES" runner.resume_dir=auto "${@:2}"

# Runs in the background, so that it outlives this connection. A signal to one process stops all at the same step.
on all "cd $JAXPAR_FOLDER || exit; nohup $train >jaxpar.log 2>&1 </dev/null & echo \$! >jaxpar.pid"
ssh="gcloud compute tpus tpu-vm ssh $JAXPAR_TPU --zone=$JAXPAR_ZONE --worker=0 --command"
echo "watch: $ssh='tail -F $JAXPAR_FOLDER/jaxpar.log'"
echo "save and stop: $ssh='kill \$(cat $JAXPAR_FOLDER/jaxpar.pid)'"
