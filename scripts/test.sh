#!/usr/bin/env bash
# Run the test suite (15 minutes on 2 cores): bash scripts/test.sh [pytest arguments]
set -euo pipefail
extras="all test docs"
. "$(dirname "$0")/lib/environment.sh"
cd "$repository"
python -m pytest "$@"
