"""The address of a server, taken before anything heavy is loaded."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from diablo.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def taken_address(host: str, port: int) -> socket.socket:
    """A socket on an address, which nobody else can take from now on. It does not listen yet.

    Args:
        host: a name or an address of this machine.
        port: the port; 0 for any that is free.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise UserError(
            f"--host, --port: {host}:{port} cannot be had ({error.strerror or error}); give an address of this machine "
            "and a port that is free, such as --port 0 for any."
        ) from None
    return taken


def url_of(taken: socket.socket) -> str:
    """The address of a socket as a URL."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
