"""A server from its socket to its end."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn

from tokenprune.serve.app import create_app
from tokenprune.serve.connections import HEADER_BYTES, connections_of
from tokenprune.serve.limits import Limits
from tokenprune.serve.strategies import Choices
from tokenprune.utils.sockets import BACKLOG, url_of

if TYPE_CHECKING:
    import socket


def config_of(model: Any, choices: Choices | None = None, limits: Limits | None = None) -> uvicorn.Config:
    """How uvicorn runs the server; arguments as of `create_app`."""
    limits = limits or Limits()
    return uvicorn.Config(
        create_app(model, choices, limits),
        http=connections_of(limits),
        h11_max_incomplete_event_size=HEADER_BYTES,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
    )


def serve(model: Any, listening: socket.socket, choices: Choices, limits: Limits, say: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or SIGINT; then answer those that were accepted, and return.

    Args:
        model: a `SegmentationModel` or an `AnsweringModel`.
        listening: a socket that listens.
        choices, limits: as in `create_app`.
        say: prints the line with the URL, once connections are accepted.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # else clients fill the log with broken forms
    server = uvicorn.Server(config_of(model, choices, limits))

    def stop(*_: Any) -> None:
        server.should_exit = True

    # For signals before uvicorn handles them itself; it raises them again at its end, and the program ends well.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        say(f"serving {model.name} on {url_of(listening)}")
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
