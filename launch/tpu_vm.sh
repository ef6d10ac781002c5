#!/usr/bin/env bash
# A Cloud TPU slice, from your own machine:   TPU=my-v6e-64 ZONE=us-east5-b WORKDIR=gs://bucket/run launch/tpu_vm.sh
# Variables: CONFIG, WORKDIR (gs://), ARGS; TPU, ZONE, PROJECT. The code here is copied to every worker; a worker's run is
# started again when it fails, and after a preemption by running this file again: it goes on where it was.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${WORKDIR:?gs://bucket/folder}"
CONFIG=${CONFIG:-configs/stage1.py}
PROJECT=${PROJECT:-$(gcloud config get-value project)}
here="$(cd "$(dirname "$0")/.." && pwd)"
to=(--zone="$ZONE" --project="$PROJECT" --worker=all)

git -C "$here" archive --format=tar.gz -o /tmp/opensora_jax.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/opensora_jax.tar.gz "$TPU":/tmp/ "${to[@]}"
gcloud compute tpus tpu-vm ssh "$TPU" "${to[@]}" --command="
  set -e; mkdir -p ~/opensora_jax; cd ~/opensora_jax; tar xzf /tmp/opensora_jax.tar.gz
  python3 -m venv .venv; .venv/bin/pip install -q -e '.[tpu]'
  for attempt in 1 2 3 4 5; do
    code=0
    .venv/bin/python -m opensora_jax.train --config=$CONFIG --workdir=$WORKDIR ${ARGS:-} >>~/train.log 2>&1 || code=\$?
    [ \$code -eq 0 ] && exit 0
    [ \$code -eq 2 ] && break
    sleep 20
  done
  tail -n 20 ~/train.log; exit \$code"
