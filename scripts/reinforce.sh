#!/usr/bin/env bash
# Stage 3: reinforce the drawing by rewards. Without arguments: continue from the last `bash scripts/finetune.sh`.
#   bash scripts/reinforce.sh [--model_name_or_path M --prompts p.txt --rewards '{NAME: 1.0}' --output_dir out ...]
set -euo pipefail
extras=train
. "$(dirname "$0")/lib/environment.sh"
exec python -m llava_ext.cli reinforce "$@"
