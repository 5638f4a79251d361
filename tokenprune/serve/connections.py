"""Connections that a client cannot hold open for nothing: slow headers, answers that are not read, too many at once."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenprune.serve.limits import Limits

HEADER_SECONDS = 10.0  # for the headers of a request, and for what still comes of an upload that has its answer
SPARE = 480  # connections beside those of the queue; fewer than the files that a process may usually have open
HEADER_BYTES = 2**14


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with limits.

    Attributes:
        seconds: that a client may take to read an answer.
        most: connections at once.
    """

    seconds = 60.0
    most = SPARE

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers, or refuse a connection that is one too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(503, f"{self.most} connections are open; try again later", "Retry-After: 1\r\n")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read its answer: it has some seconds, or the request would never end."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads on."""
        if self._stuck is not None:
            self._stuck.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Tell in JSON that these bytes are no HTTP."""
        self.conn.send_failed()
        if self._is_answering() and self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(400, f"invalid HTTP, or more than {HEADER_BYTES} bytes of headers")

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Have a timer unless a request is being answered, whose time others limit."""
        if self._is_answering():
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if self.cycle is None:
            self._refuse(408, f"no complete request in {HEADER_SECONDS:g} seconds")
        elif not self._is_answering():  # a request that was sent ahead may have begun meanwhile
            self.transport.close()

    def _refuse(self, status: int, detail: str, headers: str = "") -> None:
        """Answer by hand, and close."""
        body = json.dumps({"detail": detail})
        start = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{headers}content-type: application/json\r\n"
        self.transport.write(f"{start}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()


def connections_of(limits: Limits) -> type[Connection]:
    """The class of a server's connections."""
    return type("Connection", (Connection,), {"seconds": limits.seconds, "most": limits.queue + SPARE})
