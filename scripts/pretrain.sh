#!/usr/bin/env bash
# Stage 1: projectors and image head train, the LLM is frozen. Without arguments: the embedded default.
#   bash scripts/pretrain.sh [--recipe paper | my.yaml] [--data_path f.json --image_folder dir --vision_tower dir ...]
set -euo pipefail
extras=train
. "$(dirname "$0")/lib/environment.sh"
exec python -m llava_ext.cli pretrain "$@"
