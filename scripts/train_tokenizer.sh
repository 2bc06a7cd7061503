#!/usr/bin/env bash
# Train a tokenizer on images: folders, tar shards, Parquet files or data sets on the Hugging Face Hub.
#   bash scripts/train_tokenizer.sh --data SOURCE... --output_dir FOLDER [--recipe photos | base | paper | my.yaml] [--max_steps N ...]
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
case " $* " in
  *" --recipe "* | *" --recipe="*) launch evotok_plugin.cli train "$@" ;;
  *) launch evotok_plugin.cli train --recipe photos "$@" ;;
esac
