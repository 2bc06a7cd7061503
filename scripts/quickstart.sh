#!/usr/bin/env bash
# Runs everything on the embedded default, without downloads or a GPU: renders the scene corpus, trains teacher, tokenizer
# and MLLM, evaluates with lmms-eval, and writes a table and pictures to outputs/quickstart.
#   bash scripts/quickstart.sh [--fast]
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
cd "$repository"
exec python scripts/quickstart.py "$@"
