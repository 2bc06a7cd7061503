#!/usr/bin/env bash
# Test and measure on one GPU what needs a GPU, in at most 9 minutes: bash scripts/gpu/check.sh OUT [--cpu]
# Runs in the checkout with the Python of the machine (or $PYTHON): nothing is installed, downloaded or activated.
set -euo pipefail
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname "${BASH_SOURCE[0]}")/check.py" "$@"
