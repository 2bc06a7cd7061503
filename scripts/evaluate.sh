#!/usr/bin/env bash
# Evaluate a model: a separate lmms-eval run for each task (or group of tasks), then one table and a plot of all results.
# Rerun the command to resume. The exit code is 1 if a task failed.
#   bash scripts/evaluate.sh [--model DIR] [--tasks evotok_understanding geneval ...] [--limit N] [--output DIR]
# Without arguments: the scene tasks on the newest model. NPROC=8 starts eight processes; EVOTOK_DATA_ROOT is a folder of local data sets.
set -euo pipefail
extras=eval
. "$(dirname "$0")/lib/environment.sh"
exec python -m eval_tasks.cli run "$@"
