# Sourced by quickstart.sh and test.sh: creates .venv and installs the package into it. Needs only Python 3.10 or newer
# and a package index.

# Never go through a proxy to reach this machine, whatever the environment says.
no_proxy=${no_proxy:-${NO_PROXY:-}} # programs read either; the lower-case one wins
export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
export NO_PROXY=$no_proxy

say() { printf '%s\n' "$*"; }

fail() {
    printf '\nFAILED: %s\n' "$*" >&2
    exit 1
}

# make_environment EXTRAS LOG_FILE: an up-to-date .venv takes no time.
make_environment() {
    local extras=$1 log=$2 python=${PYTHON:-python3} stamp
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        command -v "$python" >/dev/null || fail "$python not found; install Python 3.10 or newer, or set PYTHON"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$("$python" --version) is too old; Python 3.10 or newer is required (set PYTHON to choose another)"
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python has no venv module; on Debian and Ubuntu: apt install python3-venv"
        "$python" -m venv --clear .venv >"$log" 2>&1 || fail "could not create .venv: $(tail -n 1 "$log")"
    fi
    stamp="$(cksum <pyproject.toml) $extras"
    if grep -qsxF "$stamp" .venv/llama_tp.installed; then
        return
    fi
    : >"$log"
    say "  installing torch and the package into .venv (several minutes on a slow connection; log: $log)"
    # torch first and pinned, so that later packages accept this version.
    install "$log" torch==2.13.0
    install "$log" -e ".[$extras]"
    printf '%s\n' "$stamp" >>.venv/llama_tp.installed
}

install() {
    local log=$1
    shift
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1 && return
    if grep -qiE 'name resolution|connection (refused|error)|network is unreachable|max retries|timed out|newconnectionerror|from versions: none' "$log"; then
        fail "pip could not install $*: the package index is unreachable or lacks a package; see $log"
    fi
    fail "pip could not install $*: $(grep -E '^ERROR' "$log" | tail -n 1); see $log"
}
