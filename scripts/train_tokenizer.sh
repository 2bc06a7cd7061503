#!/usr/bin/env bash
# Train a tokenizer on images: folders, tar shards, Parquet files or data sets on the Hugging Face Hub.
#   bash scripts/train_tokenizer.sh --data SOURCE... --output_dir FOLDER [--recipe photos | base | paper | my.yaml] [--max_steps N ...]
set -euo pipefail
extras=train
. "$(dirname "$0")/lib/environment.sh"
case " $* " in
  *" --recipe "* | *" --recipe="*) exec python -m evotok_plugin.common.launcher evotok_plugin.cli train "$@" ;;
  *) exec python -m evotok_plugin.common.launcher evotok_plugin.cli train --recipe photos "$@" ;;
esac
