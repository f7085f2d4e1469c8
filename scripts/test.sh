#!/usr/bin/env bash
# Set up .venv if needed, then run pytest with the given arguments (default: all tests).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
mkdir -p .demo/logs
make_environment serve,demo,test,clients,dev .demo/logs/install.log
export PATH="$PWD/.venv/bin:$PATH"
# Two processes: one for all tests that start processes, the other for unit tests, until only those are left (or -n 0).
export LLAMA_TP_COMPLETE_TESTS=1  # everything is installed: nothing may be skipped for lack of a package
exec .venv/bin/python -m pytest -n 2 "$@"
