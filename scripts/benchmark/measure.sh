#!/usr/bin/env bash
# Measure the tables that the documentation takes from scripts/benchmark/results, and write them there. Run it on an idle
# machine with two cores and 16 GiB of memory; it takes about half an hour.
#   bash scripts/benchmark/measure.sh [FOLDER OF PHOTOGRAPHS]
set -euo pipefail
cd "$(dirname "$0")/../.."
results=scripts/benchmark/results
photos=()
[ $# -eq 0 ] || photos=(--images "$1")

measure() { # measure NAME SCRIPT FLAGS...: writes NAME.json
    echo "== $1" >&2
    python "scripts/benchmark/$2.py" "${@:3}" --json "$results/$1.json"
}

for threads in 1 2; do
    measure "quantizer_$threads" quantizer --images 1 8 --rounds 25 --peer_rounds 2 --threads "$threads"
done
measure encoding encoding --sizes tiny photos "${photos[@]}"
measure encoding_base encoding --sizes base "${photos[@]}"
measure tokenizer_step tokenizer_step --recipes tiny photos
measure tokenizer_step_base tokenizer_step --recipes base --batch_size 2 --steps 2 --set bf16=false
measure tokenizer_step_paper tokenizer_step --recipes paper paper_384 --batch_size 1 --steps 1 --set bf16=false
measure train_throughput train_throughput --threads 1 --clock cpu
measure serving serving --seconds 8
for steps in 3 12; do
    measure "memory_$steps" memory --steps "$steps"
done
measure memory_fast memory --fast
python scripts/benchmark/collect.py --write
