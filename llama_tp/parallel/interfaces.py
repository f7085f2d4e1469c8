"""Check the network interfaces that the ranks communicate over."""

from __future__ import annotations

import os
import socket


def check_gloo_interfaces() -> None:
    """ValueError if GLOO_SOCKET_IFNAME names an interface that this host lacks. gloo would report it in a hundred
    lines on every rank."""
    wanted = [name.strip() for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    available = [name for _, name in socket.if_nameindex()]
    for name in wanted:
        if name not in available:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={os.environ['GLOO_SOCKET_IFNAME']}: this host has no network interface {name!r}; "
                f"it has {', '.join(available)}"
            )
