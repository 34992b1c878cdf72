#!/usr/bin/env bash
# Sets up, then checks style and types and runs the tests. Arguments go to pytest: bash launch/test.sh tests/plan -k layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

export OMP_NUM_THREADS=1 # tests start several ranks; more threads would only fight over the cores
say "ruff"
"$python" -m ruff check .
say "mypy"
"$python" -m mypy
say "pytest"
"$python" -m pytest "$@"
