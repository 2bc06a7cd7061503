#!/usr/bin/env bash
# Trains a tokenizer on a folder of images.
#   bash scripts/train_tokenizer.sh --data FOLDER --output_dir FOLDER [--recipe tokenizer_photos | my.yaml] [--max_steps N ...]
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
case " $* " in
  *" --recipe "* | *" --recipe="*) launch evotok_plugin.cli train "$@" ;;
  *) launch evotok_plugin.cli train --recipe tokenizer_photos "$@" ;;
esac
