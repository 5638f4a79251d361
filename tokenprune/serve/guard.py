"""What comes in: uploads are read here, with bounds for bytes, time and number, before anything else sees them."""

from __future__ import annotations

import asyncio
import time

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenprune.serve.limits import MEGABYTE, Limits
from tokenprune.serve.metrics import Metrics

RETRY = {"Retry-After": "1"}
CLOSED = 499  # no one reads it: as other servers count clients that left


class Guard:
    """ASGI middleware that reads whole uploads, and lets no more than `limits.queue` of them in.

    An upload that is slow, or never ends, holds none of these places: it gets one when it is complete. All uploads that
    are coming in may hold `limits.queue` · `limits.body` bytes of memory.

    Args:
        app: what answers.
        limits: the server's.
        routes: paths that take uploads.
        metrics: counts the answers.
    """

    def __init__(self, app: ASGIApp, limits: Limits, routes: tuple[str, ...], metrics: Metrics) -> None:
        self._app, self._limits, self._routes, self._metrics = app, limits, routes, metrics
        self._inside = 0  # complete requests; only the event loop reads and writes these
        self._held = 0  # bytes of incomplete ones
        metrics.watch_uploads(lambda: self._held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["method"] == "POST" and scope["path"] in self._routes:
                await self._guarded(scope, receive, counting)
            else:
                await self._app(scope, receive, counting)
        finally:
            self._metrics.answered(scope["path"], status, time.perf_counter() - start)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_headers(Headers(scope=scope))
            self._check_room()  # before the upload, which would be in vain
            receive = _replayed(await self._upload(receive), receive)  # the only reference to the bytes
            self._check_room()
        except HTTPException as error:
            answer = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            await answer(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1

    def _check_headers(self, headers: Headers) -> None:
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise HTTPException(415, "expected a multipart/form-data request with the fields image and query")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limits.body:
            raise self._too_large()

    def _check_room(self) -> None:
        if self._inside >= self._limits.queue:
            raise HTTPException(503, f"{self._inside} requests are waiting; try again later", RETRY)

    async def _upload(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            await asyncio.wait_for(self._read(receive, body), self._limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(
                408, f"the upload took more than {self._limits.seconds:g} seconds", {"Connection": "close"}
            ) from None
        finally:
            self._held -= len(body)
        return bytes(body)

    async def _read(self, receive: Receive, body: bytearray) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(CLOSED, "the client left")
            part = message.get("body", b"")
            if len(body) + len(part) > self._limits.body:
                raise self._too_large()
            if self._held + len(part) > self._limits.queue * self._limits.body:
                raise HTTPException(503, "too many uploads at once; try again later", RETRY)
            body += part
            self._held += len(part)
            more = message.get("more_body", False)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"more than {self._limits.upload / MEGABYTE:g} MB; send a smaller image")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read: the body, then what is left, which is the end of the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
