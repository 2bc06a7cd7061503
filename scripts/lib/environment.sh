# Sourced by the scripts: choose the Python environment. Set `extras` first: what the script needs, as in pyproject.toml.
# Without an active environment, `.venv` in the checkout is used, created, and kept up to date. Nothing is ever installed
# into an environment that the user has activated: if it lacks something, the script prints the command that installs it.

caller_folder="$PWD"
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

use_environment() {
  local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [ -n "$active" ] && [ ! "$active" -ef "$repository/.venv" ]; then
    check_environment "$active"
    return
  fi
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
  install_project
}

# Stop unless an environment of the user has everything that the script needs.
check_environment() {
  local lacking wanted="${extras:-all}"
  # shellcheck disable=SC2086
  lacking="$(python "$repository/scripts/lib/missing.py" $wanted)" || exit 2
  [ -z "$lacking" ] && return
  echo "error: the active environment $1 lacks $(echo "$lacking" | paste -sd ' '). Install it with
  python -m pip install -c '$repository/constraints.txt' -e '$repository[${wanted// /,}]'
or deactivate the environment: this script then creates its own, .venv in the checkout." >&2
  exit 2
}

# Install the project into `.venv`, once per version of pyproject.toml and constraints.txt.
install_project() {
  local stamp state
  stamp="$repository/.venv/.evotok-installed"
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

use_environment
cd "$caller_folder"
