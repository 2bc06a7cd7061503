#!/usr/bin/env bash
# Build sdist and wheel, install the wheel outside the checkout, and use it there: draw, train two steps, evaluate.
#   bash scripts/package.sh [FOLDER]      FOLDER: a new folder for both packages; by default a temporary one
# The libraries are those of the environment that runs the script; only the project comes from the wheel.
set -euo pipefail
extras="all dev"
. "$(dirname "$0")/lib/environment.sh"
target="${1:-$(mktemp -d)}"
[ -z "$(ls -A "$target" 2>/dev/null)" ] || { echo "error: $target is not empty; give a new folder" >&2; exit 2; }
mkdir -p "$target"
target="$(cd "$target" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

libraries="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
git -C "$repository" archive HEAD | (mkdir -p "$work/source" && tar -x -C "$work/source")
python -m build --outdir "$target" "$work/source" > "$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
rm -rf "$work/source"
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-deps --no-index "$target"/*.whl
site="$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo "$libraries" > "$site/libraries.pth"

mkdir "$work/empty"
cd "$work/empty"
export PATH="$work/venv/bin:$PATH" HF_HUB_OFFLINE=1
python -c 'import evotok_plugin, sys; sys.exit("checkout" if "site-packages" not in evotok_plugin.__file__ else 0)'
evotok --version
evotok-llava draw "a photo of a red circle" -o drawn
python -m llava_ext.embedded.prepare --workspace work --fast
evotok-llava pretrain --workspace work --max_steps 2 --use_cpu true
evotok-llava finetune --workspace work --max_steps 2 --use_cpu true
python -m lmms_eval --model evotok --tasks geneval_scenes --limit 2 --output_path evaluated
ls drawn/*.png work/pretrain/model.safetensors work/finetune/model.safetensors evaluated
ls "$target"
