#!/usr/bin/env bash
# Stage 2 with QLoRA: adapters on a 4-bit LLM. Without arguments: continue from the last `bash scripts/pretrain.sh`.
#   bash scripts/finetune_qlora.sh [--recipe my.yaml] [--model_name_or_path outputs/pretrain ...]
set -euo pipefail
extras="train quant"
. "$(dirname "$0")/lib/environment.sh"
exec python -m llava_ext.cli finetune-qlora "$@"
