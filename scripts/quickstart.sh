#!/usr/bin/env bash
# The main job on the embedded default, with no download and no GPU: draw the scene corpus, train teacher, tokenizer
# and MLLM, evaluate with lmms-eval, write a table and pictures to outputs/quickstart.
#   bash scripts/quickstart.sh [--fast]
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
cd "$repository"
exec python scripts/quickstart.py "$@"
