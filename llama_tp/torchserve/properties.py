"""TorchServe's config.properties, and its listening addresses. Settings are honored or rejected by name."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama_tp.torchserve.errors import ServerError

MAX_PORT = 65534
"""TorchServe does not accept 65535."""

_ADDRESS = re.compile(r"(https?)://([^:/]+)(?::([0-9]+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Address:
    """An `..._address` in config.properties."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def local_host(self) -> str:
        """The host to connect to from this machine."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Listeners(NamedTuple):
    """TorchServe's HTTP addresses."""

    inference: Address
    management: Address
    metrics: Address


class Properties:
    """A config.properties file as TorchServe reads it, with the TS_* variables if it enables them."""

    def __init__(self, text: str = "", path: str | Path = "", environment: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.path = path
        self.values = parse_properties(text)
        if self.is_true("enable_envvars_config"):
            variables = os.environ if environment is None else environment
            self.values |= {
                name.removeprefix("TS_").lower(): value for name, value in variables.items() if name.startswith("TS_")
            }

    @classmethod
    def read(cls, path: str | Path, environment: Mapping[str, str] | None = None) -> Properties:
        """ServerError if the file cannot be read."""
        try:
            return cls(Path(path).read_text(encoding="latin-1"), path, environment)  # as Java does
        except OSError as error:
            raise ServerError(f"--properties {path}: {error.strerror}") from None

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def is_true(self, key: str) -> bool:
        return self.values.get(key, "").strip().lower() == "true"

    def said(self, key: str) -> str:
        """A setting and its file, for messages."""
        return f"{key}={self.values[key]} in {self.path}"

    def address(self, key: str) -> Address | None:
        """ServerError if `llama-tp serve` cannot use the address."""
        value = self.values.get(key)
        if value is None:
            return None
        found = _ADDRESS.fullmatch(value)
        if found is None:
            raise ServerError(f"{self.said(key)}: must be http://HOST:PORT with an IPv4 address or a host name")
        scheme, host, port = found.groups()
        if port is None:
            raise ServerError(f"{self.said(key)}: has no port; append one, such as :8080")
        return Address(scheme.lower(), host, valid_port(int(port), self.said(key)))

    def listeners(self, host: str | None = None, port: int | None = None) -> Listeners:
        """The addresses from the file and the command line. ServerError if they conflict."""
        own = self.address("inference_address")
        if own is None:
            chosen = valid_port(8080 if port is None else port, f"--port {port}")
            inference = Address("http", _valid_host("127.0.0.1" if host is None else host), chosen)
        else:
            for flag, given, other in (("host", host, own.host), ("port", port, own.port)):
                if given is not None and given != other:
                    said = self.said("inference_address")
                    raise ServerError(f"--{flag} {given} contradicts {said}; set only one of them")
            inference = own
        others = []
        for offset, key in enumerate(("management_address", "metrics_address"), 1):
            default_port = inference.port + offset
            default = Address("http", "127.0.0.1", default_port)
            others.append(self.address(key) or default)
            if others[-1] is default and default_port > MAX_PORT:
                raise ServerError(
                    f"--port {inference.port}: {key.removesuffix('_address')} would be at {default_port}; "
                    f"choose a port of at most {MAX_PORT - 2}, or set {key}"
                )
        return Listeners(inference, *others)


def parse_properties(text: str) -> dict[str, str]:
    """Java's format (java.util.Properties.load): comments, continued lines; `=`, `:` or a space after the key."""
    values = {}
    for line in re.sub(r"(?<!\\)((?:\\\\)*)\\\n[ \t\f]*", r"\1", text.replace("\r\n", "\n")).split("\n"):
        found = re.fullmatch(r"\s*((?:\\.|[^\s=:#!\\])(?:\\.|[^\s=:\\])*)\s*[=:]?\s*(.*)", line)
        if found:
            key, value = (_unescape(part) for part in found.groups())
            values[key] = value
    return values


def _unescape(text: str) -> str:
    named = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}

    def one(found: re.Match[str]) -> str:
        code, char = found.groups()
        return chr(int(code, 16)) if code else named.get(char, char)

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", one, text)


def escaped(text: str) -> str:
    """Text as a value in a properties file."""
    units = text.encode("utf-16-be").hex()
    codes = (int(units[at : at + 4], 16) for at in range(0, len(units), 4))
    return "".join(chr(code) if 32 < code < 127 and code != ord("\\") else f"\\u{code:04x}" for code in codes)


def valid_port(port: object, said: str) -> int:
    """ServerError, quoting `said`, if it is not a port."""
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= MAX_PORT:
        raise ServerError(f"{said}: a port must be an integer from 1 to {MAX_PORT}")
    return port


def _valid_host(host: object) -> str:
    if not isinstance(host, str) or not re.fullmatch(r"[^\s:/^]+", host):
        raise ServerError(f"--host {host}: must be an IPv4 address or a host name, such as 0.0.0.0")
    return host


def check_free(address: Address, said: str = "choose another with --port") -> None:
    """ServerError if the port is in use or the address is not of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except socket.gaierror as error:
            raise ServerError(f"host {address.host!r} does not resolve ({error.strerror})") from None
        except PermissionError:
            raise ServerError(f"port {address.port} may only be used by root; {said}") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ServerError(f"host {address.host!r} is not an address of this machine") from None
            raise ServerError(f"port {address.port} is in use ({error.strerror}); {said}") from None
