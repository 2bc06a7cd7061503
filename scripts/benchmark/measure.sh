#!/usr/bin/env bash
# Measure the tables that the documentation takes from scripts/benchmark/results, and write them there. Run it on an idle
# machine with two cores and 16 GiB of memory; all of it takes more than half an hour.
#   bash scripts/benchmark/measure.sh [--only NAME ...] [FOLDER OF PHOTOGRAPHS]
# NAME is a result (text_1) or a script (text). A benchmark that fails, also because its codes or losses differ from the
# baseline's, keeps its earlier result; the others still run, and the exit code is 1.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=scripts/benchmark/results

benchmarks() { # calls step NAME SCRIPT FLAGS... for each; NAME.json is the result
    for threads in 1 2; do
        step "quantizer_$threads" quantizer --images 1 8 --rounds 25 --peer_rounds 2 --threads "$threads"
        step "generation_$threads" generation --threads "$threads"
        step "text_$threads" text --threads "$threads"
        step "linear_layers_$threads" linear_layers --threads "$threads"
        step "guidance_cost_$threads" guidance_cost --models included --threads "$threads"
    done
    step guidance_cost_paper guidance_cost --models paper --rounds 1 --threads 2
    step encoding encoding --sizes tiny photos "${photos[@]}"
    step encoding_base encoding --sizes base "${photos[@]}"
    step tokenizer_step tokenizer_step --recipes tiny photos
    step tokenizer_step_base tokenizer_step --recipes base --batch_size 2 --steps 2 --set bf16=false
    step tokenizer_step_paper tokenizer_step --recipes paper paper_384 --batch_size 1 --steps 1 --set bf16=false
    step train_throughput train_throughput --threads 1 --clock cpu
    step finetuning finetuning --threads 1 --clock cpu
    step scene_tasks scene_tasks
    for script in dialogues out_of_domain diversity; do
        step "$script" "$script" --model llava_ext/pretrained/scenes --threads 1
    done
    step serving serving --seconds 8
    step start_up start_up
    step evaluation_time evaluation_time --threads 1
    step speculation speculation --threads 1 --windows 2 4 8 --rounds 2 --backbones
    step speculation_cost speculation --threads 1 --windows 2 4 8 --prompts_per_skill 0 --rounds 1
    for steps in 3 12; do
        step "memory_$steps" memory --steps "$steps"
    done
    step memory_fast memory --fast
}

photos=() only=()
names=$(
    step() { printf '%s\n' "$1" "$2"; }
    benchmarks
)
selecting=false
for word; do
    if [ "$word" = --only ]; then
        selecting=true
    elif $selecting && grep -qxF -- "$word" <<<"$names"; then
        only+=("$word")
    elif [ -d "$word" ]; then
        photos=(--images "$word")
    else
        echo "expected a folder of photographs, or after --only one of $(sort -u <<<"$names" | xargs); got $word" >&2
        exit 2
    fi
done
if $selecting && [ ${#only[@]} -eq 0 ]; then
    echo "--only needs one of $(sort -u <<<"$names" | xargs)" >&2
    exit 2
fi

output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
trap 'exit 130' INT
failed=()
step() {
    if $selecting && [[ " ${only[*]} " != *" $1 "* && " ${only[*]} " != *" $2 "* ]]; then
        return
    fi
    echo "== $1" >&2
    python "scripts/benchmark/$2.py" "${@:3}" --json "$output/$1.json" && mv "$output/$1.json" "$results" || failed+=("$1")
}
benchmarks
python scripts/benchmark/collect.py --write
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
