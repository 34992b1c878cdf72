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
# All of it in two processes, a file in one of them; what is asked for in one, where output and order are those of pytest.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
"$python" -m pytest "$@"
