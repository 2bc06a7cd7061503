#!/usr/bin/env bash
# Stage 2 with QLoRA: adapters on an LLM in 4 bits. Without arguments: goes on from the last `bash scripts/pretrain.sh`.
#   bash scripts/finetune_qlora.sh [--recipe my.yaml] [--model_name_or_path outputs/pretrain ...]
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
train_stage finetune_qlora "$@"
