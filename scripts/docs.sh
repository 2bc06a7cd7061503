#!/usr/bin/env bash
# Build the documentation site with strict links: bash scripts/docs.sh [arguments of mkdocs build]
set -euo pipefail
extras="all docs"
. "$(dirname "$0")/lib/environment.sh"
cd "$repository"
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet "$@"
