#!/usr/bin/env bash
# Run all stages on the embedded default, without downloads and without a GPU: draw the scene corpus, train teacher,
# tokenizer and MLLM, evaluate with lmms-eval, and write a table and images to outputs/quickstart.
#   bash scripts/quickstart.sh [--fast] [--seed N] [--workspace DIR]
set -euo pipefail
extras="train eval"
. "$(dirname "$0")/lib/environment.sh"
cd "$repository"
exec python scripts/quickstart.py "$@"
