#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests. Arguments go to pytest.
#
#   ./launch/test.sh                       all but the slow ones and those that need a GPU, two files at a time
#   ./launch/test.sh -m slow               minutes of proof: many ranks, killed and resumed runs
#   ./launch/test.sh tests/test_losses.py -k masked
set -euo pipefail
. "$(dirname "$0")/env.sh"

./launch/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start ranks, and several threads in each would fight for the cores
if [[ $# -eq 0 ]]; then set -- -m "not slow and not gpu" --numprocesses 2 --dist loadfile; fi
run .venv/bin/python -m pytest "$@"
