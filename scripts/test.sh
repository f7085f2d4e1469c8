#!/usr/bin/env bash
# Set up what is missing, then run the tests: all of them, or what is passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
mkdir -p .demo/logs
make_environment serve,demo,test,dev .demo/logs/install.log
export PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python -m pytest "$@"
