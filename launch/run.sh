#!/usr/bin/env bash
# One process of a run; every other file here starts this one on each machine.
# Variables: CONFIG, WORKDIR (one folder or bucket for all machines), ARGS; RESTARTS: how often to start again after a crash.
# What it prints also goes to WORKDIR/logs/<machine>-<process>.log; to a bucket when the process ends.
set -uo pipefail
CONFIG=${CONFIG:-configs/stage1.py}
WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)}
name=$(hostname)-${PROCESS_ID:-${SLURM_PROCID:-${JOB_COMPLETION_INDEX:-0}}}.log
case $WORKDIR in
  *://*) log=$(mktemp -d)/$name ;;
  *) mkdir -p "$WORKDIR/logs" && log=$WORKDIR/logs/$name ;;
esac

for attempt in $(seq 0 "${RESTARTS:-0}"); do
  [ "$attempt" -eq 0 ] || sleep "${RESTART_SECONDS:-20}"
  # shellcheck disable=SC2086  # ARGS is several words
  python -m opensora_jax.train --config="$CONFIG" --workdir="$WORKDIR" ${ARGS:-} > >(tee -a "$log") 2>&1 &
  run=$!
  trap 'kill -TERM $run 2>/dev/null' TERM INT # a preemption: the run saves, and ends with 0
  wait "$run"; code=$?
  while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done # a signal ends `wait`, not the run
  [ "$code" -eq 0 ] || [ "$code" -eq 2 ] && break # done, or a mistake that a restart would repeat
done
case $WORKDIR in
  *://*) python -c 'import sys; from etils import epath; to = epath.Path(sys.argv[2]); to.parent.mkdir(parents=True, exist_ok=True)
to.write_text(open(sys.argv[1]).read())' "$log" "$WORKDIR/logs/$name" ;;
esac
exit "$code"
