#!/usr/bin/env bash
# GPUs under SLURM, one process a machine:   WORKDIR=/shared/run launch/slurm.sh --nodes=4 [further flags of sbatch]
# Variables: CONFIG, WORKDIR (shared by all machines), ARGS. Requeued on preemption and, when time is up, ended with a checkpoint.
#SBATCH --job-name=opensora_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
set -euo pipefail
export CONFIG=${CONFIG:-configs/stage1.py}
export WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)} ARGS=${ARGS:-}
mkdir -p "$WORKDIR/logs" # SLURM does not make it, and loses what the job says

if [ -z "${SLURM_JOB_ID:-}" ]; then
  exec sbatch --output="$WORKDIR/logs/slurm-%j.log" "$@" "$0"
fi
srun --kill-on-bad-exit=1 --output=/dev/null bash launch/run.sh
