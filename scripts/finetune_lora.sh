#!/usr/bin/env bash
# Stage 2 with LoRA: adapters on the LLM. Without arguments: continue from the last `bash scripts/pretrain.sh`.
#   bash scripts/finetune_lora.sh [--recipe paper_finetune_lora | my.yaml] [--model_name_or_path outputs/pretrain ...]
set -euo pipefail
extras=train
. "$(dirname "$0")/lib/environment.sh"
exec python -m llava_ext.cli finetune-lora "$@"
