# Sourced by the scripts: activate or create the Python environment, install the project, and define launchers.
# An active virtual environment (or conda environment) is used; otherwise `.venv` in the checkout is created.

caller_folder="$PWD"
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

use_environment() {
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x "$repository/.venv/bin/python" ]; then
      "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is required, found $("${PYTHON:-python3}" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
        exit 2
      }
      echo "creating the virtual environment .venv" >&2
      "${PYTHON:-python3}" -m venv "$repository/.venv"
    fi
    # shellcheck disable=SC1091
    . "$repository/.venv/bin/activate"
  fi
  install_project
}

# Install the project once per version of pyproject.toml and constraints.txt.
install_project() {
  local stamp state
  stamp="$(python -c 'import sys; print(sys.prefix)')/.evotok-installed"
  state="$(cat "$repository/pyproject.toml" "$repository/constraints.txt" | cksum) $repository"
  [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return
  echo "installing the project and its dependencies (once; takes several minutes)" >&2
  python -m pip install --quiet --disable-pip-version-check \
    -c "$repository/constraints.txt" -e "$repository[all,test,dev,docs]" >&2 || {
    echo "error: installation failed; see the messages above" >&2
    exit 2
  }
  echo "$state" > "$stamp"
}

# The number of visible GPUs, at least 1; CUDA_VISIBLE_DEVICES selects among them.
visible_gpus() {
  local names="${CUDA_VISIBLE_DEVICES-unset}" found=0
  if [ "$names" != unset ]; then
    IFS=, read -r -a names <<< "$names"
    for name in ${names[@]+"${names[@]}"}; do
      [ "$name" = -1 ] && break
      found=$((found + 1))
    done
  elif command -v nvidia-smi > /dev/null; then
    found="$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)"
  fi
  echo $((found > 1 ? found : 1))
}

# launch MODULE ARGUMENTS...: start one process, or torchrun for several processes (NPROC, by default one per visible
# GPU, or one with --use_cpu true) or nodes (NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, as for torchrun). It replaces the process of the script, so that a signal sent to the
# script reaches the training; torchrun then waits ten minutes for the processes to save, instead of 30 seconds.
launch() {
  local processes="${NPROC:-}"
  if [ -z "$processes" ]; then
    case " $* " in
      *" --use_cpu true "* | *" --use_cpu True "* | *" --use_cpu=true "* | *" --use_cpu=True "*) processes=1 ;;
      *) processes="$(visible_gpus)" ;;
    esac
    [ "$processes" = 1 ] || echo "starting $processes processes, one per visible GPU (NPROC)" >&2
  fi
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
  if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
    exec python -m "$@"
  elif [ "${NNODES:-1}" = 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    exec python "$repository/scripts/lib/torchrun.py" --standalone --nproc_per_node "$processes" -m "$@"
  else
    exec python "$repository/scripts/lib/torchrun.py" --nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK to this node\'s number}" \
      --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first node\'s address}" --master_port "${MASTER_PORT:-29500}" \
      --nproc_per_node "$processes" -m "$@"
  fi
}

# train_stage DEFAULT_RECIPE ARGUMENTS...: prepare the inputs of the embedded default if the recipe uses it, then train.
train_stage() {
  run_stage llava_ext.training.train "$@"
}

# run_stage MODULE DEFAULT_RECIPE ARGUMENTS...: train_stage with the command of another kind of stage.
run_stage() {
  local module="$1" recipe="$2"
  shift 2
  local rest=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --recipe) recipe="${2:?--recipe needs a name or a file}"; shift 2 ;;
      --recipe=*) recipe="${1#--recipe=}"; shift ;;
      *) rest+=("$1"); shift ;;
    esac
  done
  python -m llava_ext.embedded.prepare --recipe "$recipe" ${rest[@]+"${rest[@]}"}
  launch "$module" --recipe "$recipe" ${rest[@]+"${rest[@]}"}
}

use_environment
cd "$caller_folder"
