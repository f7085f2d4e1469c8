#!/usr/bin/env bash
# Set up what is missing, then run the tests: all of them, or what is passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
mkdir -p .demo/logs
make_environment serve,demo,test,dev .demo/logs/install.log
export PATH="$PWD/.venv/bin:$PATH"
# Two processes: one for all tests that start processes, the other for unit tests, until only those are left (or -n 0).
exec .venv/bin/python -m pytest -n 2 "$@"
