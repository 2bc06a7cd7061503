#!/usr/bin/env bash
# Evaluates a model: each task (or group of tasks) is an lmms-eval run of its own, then all results become one table and
# a plot. Stopped? The same command goes on. Ends with 1 if any task failed.
#   bash scripts/evaluate.sh [--model DIR] [--tasks evotok_understanding geneval ...] [--limit N] [--output DIR]
# Without arguments: the scene tasks on the newest model. NPROC=8: eight processes. EVOTOK_DATA_ROOT: local data sets.
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
exec python -m eval_tasks.cli run "$@"
