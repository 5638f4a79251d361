"""Sockets that listen."""

from __future__ import annotations

import os
import socket

from tokenprune.errors import InputError
from tokenprune.utils.files import reason

BACKLOG = 512  # connections that the operating system keeps until they are accepted


def opened(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one.

    It listens at once: on Linux a port that is only bound can be bound by others too.

    Raises:
        InputError: not a port, or one that is taken or not allowed; not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} found, expected a number from 0 to 65535; 0 is any free port")
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        found = reason(error) if isinstance(error, OSError) else "no name of a host"
        raise InputError(f"--host {host!r} is not an address ({found}); give one of this machine") from error
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # a port may be used again at once; on Windows this would share one in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise InputError(
            f"--host {host} --port {port} cannot be used ({reason(error)}); choose another, or port 0 for any free one"
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """The address of a socket as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
