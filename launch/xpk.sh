#!/usr/bin/env bash
# TPU slices on GKE through xpk:   CLUSTER=mine TPU=v6e-64 IMAGE=eu.gcr.io/me/opensora_jax:tpu WORKDIR=gs://bucket/run launch/xpk.sh
# Variables: CONFIG, WORKDIR (gs://), ARGS; CLUSTER, TPU, IMAGE (docker/tpu.Dockerfile), SLICES, NAME. A preempted slice is
# started again and goes on where it was.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${TPU:?type, e.g. v6e-64}" "${IMAGE:?the image to run}" "${WORKDIR:?gs://bucket/folder}"
exec xpk workload create --cluster="$CLUSTER" --workload="${NAME:-opensora-jax}" --tpu-type="$TPU" \
  --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --max-restarts=20 \
  --command="CONFIG='${CONFIG:-configs/stage1.py}' WORKDIR='$WORKDIR' ARGS='${ARGS:-}' exec bash launch/run.sh"
