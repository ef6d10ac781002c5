#!/usr/bin/env bash
# A Cloud TPU slice, from your own machine:   TPU=my-v6e-64 ZONE=us-east5-b WORKDIR=gs://bucket/run launch/tpu_vm.sh
# Variables: CONFIG, WORKDIR (gs://), ARGS; TPU, ZONE, PROJECT. The code here is copied to every worker. A crash starts a
# worker's run again; after a preemption run this file again: it goes on where it was.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${WORKDIR:?gs://bucket/folder}"
CONFIG=${CONFIG:-configs/stage1.py}
PROJECT=${PROJECT:-$(gcloud config get-value project)}
here="$(cd "$(dirname "$0")/.." && pwd)"
to=(--zone="$ZONE" --project="$PROJECT" --worker=all)
packed=$(mktemp --suffix=.tar.gz)

git -C "$here" archive --format=tar.gz -o "$packed" HEAD
gcloud compute tpus tpu-vm scp "$packed" "$TPU":/tmp/opensora_jax.tar.gz "${to[@]}"
gcloud compute tpus tpu-vm ssh "$TPU" "${to[@]}" --command="
  set -e; mkdir -p ~/opensora_jax; cd ~/opensora_jax; tar xzf /tmp/opensora_jax.tar.gz
  python3 -m venv .venv; . .venv/bin/activate; pip install -q -e '.[tpu]'
  CONFIG='$CONFIG' WORKDIR='$WORKDIR' ARGS='${ARGS:-}' RESTARTS=5 bash launch/run.sh"
