#!/usr/bin/env bash
# Set up .venv and a browser if needed, then run pytest with the given arguments (default: all tests).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

# ensure PROGRAM PACKAGE LOG_FILE [OTHER_NAME ...]: install a Debian package that some tests need, where that is possible.
ensure() {
    local program=$1 package=$2 log=$3 name root=()
    shift 3
    for name in "$program" "$@"; do
        if command -v "$name" >/dev/null; then return; fi
    done
    command -v apt-get >/dev/null || return 0
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return 0
        root=(sudo -n)
    fi
    say "  installing $package for tests that need it (log: $log)"
    { "${root[@]}" apt-get update && "${root[@]}" apt-get install -y --no-install-recommends "$package"; } >"$log" 2>&1 ||
        say "  $package could not be installed: the tests that need it will be skipped; see $log"
}

mkdir -p .demo/logs
make_environment serve,demo,test,clients,dev .demo/logs/install.log
export PATH="$PWD/.venv/bin:$PATH"
ensure chromium chromium .demo/logs/browser.log chromium-browser google-chrome google-chrome-stable chrome
if [ -n "${REQUIRE_PROGRAMS:-}" ]; then  # its package may start a server: not on anybody's own machine
    ensure nginx nginx-light .demo/logs/nginx.log
fi
# Two processes: one for all tests that start processes, the other for unit tests, until only those are left (or -n 0).
export REQUIRE_PACKAGES=1  # everything is installed: nothing may be skipped for lack of a package
exec .venv/bin/python -m pytest -n 2 "$@"
