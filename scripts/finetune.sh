#!/usr/bin/env bash
# Stage 2: the LLM also trains. Without arguments: continue from the last `bash scripts/pretrain.sh`.
#   bash scripts/finetune.sh [--recipe paper | my.yaml] [--model_name_or_path outputs/pretrain --data_path f.json ...]
set -euo pipefail
extras=train
. "$(dirname "$0")/lib/environment.sh"
exec python -m llava_ext.cli finetune "$@"
