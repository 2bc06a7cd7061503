#!/usr/bin/env bash
# Lint, formatting and types, with the settings in pyproject.toml: bash scripts/lint.sh
set -euo pipefail
extras="all test dev"
. "$(dirname "$0")/lib/environment.sh"
cd "$repository"
python -m ruff check .
python -m ruff format --check .
python -m mypy
