#!/usr/bin/env bash
# Set up .venv and a browser if needed, then run pytest with the given arguments (default: all tests).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

# ensure_browser LOG_FILE: the chat page is tested in a real one. Without it, those tests are skipped, or fail if REQUIRE_BROWSER is set.
ensure_browser() {
    local log=$1 name root=()
    for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    command -v apt-get >/dev/null || return 0
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return 0
        root=(sudo -n)
    fi
    say "  installing chromium for the tests of the chat page (log: $log)"
    { "${root[@]}" apt-get update && "${root[@]}" apt-get install -y --no-install-recommends chromium; } >"$log" 2>&1 ||
        say "  chromium could not be installed: those tests will be skipped; see $log"
}

mkdir -p .demo/logs
make_environment serve,demo,test,clients,dev .demo/logs/install.log
export PATH="$PWD/.venv/bin:$PATH"
ensure_browser .demo/logs/browser.log
# Two processes: one for all tests that start processes, the other for unit tests, until only those are left (or -n 0).
export LLAMA_TP_COMPLETE_TESTS=1  # everything is installed: nothing may be skipped for lack of a package
exec .venv/bin/python -m pytest -n 2 "$@"
