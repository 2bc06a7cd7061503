#!/usr/bin/env bash
# Evaluates a model on several tasks, one lmms-eval run each, and reports all results as a table and a plot.
# Rerun the command to resume after an interruption. Exits with 1 if any task failed.
#   bash scripts/evaluate.sh [--model DIR] [--tasks evotok_understanding geneval ...] [--limit N] [--output DIR]
# Defaults: the scene tasks on the newest model. NPROC=8 starts eight processes; EVOTOK_DATA_ROOT names local data sets.
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
exec python -m eval_tasks.cli run "$@"
