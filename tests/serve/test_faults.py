"""Clients that are slow, broken or hostile, over sockets, and many at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import numpy as np
import pytest
from fake_segmentation import FakeModel
from PIL import Image
from serving import Served, decoded, encoded, picture, refused, served, waited

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes
from tokenprune.serve import connections
from tokenprune.serve.limits import Limits

FORM = "POST /segment HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
CHUNKED = f"{FORM}transfer-encoding: chunked\r\n\r\n".encode()


@contextmanager
def connected(server: Served, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection on which these bytes were sent."""
    with socket.create_connection(server.address, timeout=20) as found:
        with suppress(BrokenPipeError, ConnectionResetError):  # the server may have answered before all of it was sent
            found.sendall(sent)
        yield found


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def answered(connection: socket.socket) -> tuple[int, str]:
    """Status and detail of the answer on which the server closes the connection."""
    head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["detail"]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def is_well(server: Served) -> bool:
    """Whether another client gets its mask at once."""
    return decoded(server.post(picture(), query="it")).shape == (24, 32)


def recovers(server: Served) -> bool:
    """Whether another client gets its mask, perhaps not at once where time is short on purpose."""
    waited(lambda: got_mask(server))
    return True


def got_mask(server: Served) -> bool:
    try:
        return server.post(picture(), query="it").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("sent", [b"", b"POST /segment HTTP/1.1\r\nhost: x\r\nx-slow: "])
def test_headers_that_do_not_end(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    with served(FakeModel()) as server, connected(server, sent) as slow:
        start = time.monotonic()
        assert answered(slow) == (408, "no complete request in 0.5 seconds")
        assert time.monotonic() - start < 10
        assert recovers(server)


def test_headers_that_do_not_end_after_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    with served(FakeModel()) as server, connected(server, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n") as slow:
        found = b""
        while not found.endswith(b"}"):
            found += slow.recv(65536)
        slow.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        start = time.monotonic()
        assert everything(slow) == b""
        assert time.monotonic() - start < 4  # sooner than by the limit of idle connections, which the bytes reset


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-large: " + b"a" * 400_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(50_000)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
        b"POST /segment HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /segment HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        CHUNKED + b"not a length\r\n",
    ],
    ids=["path", "header", "headers", "tls", "negative", "two-lengths", "chunk"],
)
def test_bytes_that_are_no_request(sent: bytes) -> None:
    with served(FakeModel()) as server:
        with connected(server, sent) as broken:
            status, detail = answered(broken)
        assert (status, detail) == (400, "invalid HTTP, or more than 16384 bytes of headers")
        assert is_well(server)


def test_uploads_that_never_end_hold_no_place_in_the_queue() -> None:
    """More of them than the queue has places: they are told in time, and others are served meanwhile."""
    with served(FakeModel(), Limits(queue=2, seconds=5.0)) as server, ExitStack() as stack:
        declared = FORM.encode() + b"content-length: 100000\r\n\r\n--b"
        slow = [
            stack.enter_context(connected(server, declared if number % 2 else CHUNKED + chunk(b"--b")))
            for number in range(40)
        ]
        end = threading.Event()

        def drip() -> None:  # some send on, a byte at a time
            while not end.wait(0.1):
                for connection in slow[:10]:
                    with suppress(OSError):
                        connection.sendall(b"x" if connection in slow[1:10:2] else chunk(b"x"))

        dripping = threading.Thread(target=drip)
        dripping.start()
        start = time.monotonic()
        while time.monotonic() - start < 1.0:
            assert is_well(server)
        told = [answered(connection) for connection in slow]
        end.set()
        dripping.join()
        assert told == [(408, "the upload took more than 5 seconds")] * 40
        assert server.metric('tokenprune_requests_total{route="/segment",status="408"}') == 40
        assert is_well(server)


def test_an_upload_that_is_too_large_is_not_read_to_its_end() -> None:
    with served(FakeModel(), Limits(upload=1000)) as server:
        with connected(server, FORM.encode() + b"content-length: 9999999999\r\n\r\n") as declared:
            assert declared.recv(65536).startswith(b"HTTP/1.1 413")
        with connected(server, CHUNKED) as endless:
            with suppress(OSError):
                for _ in range(100):
                    endless.sendall(chunk(bytes(1000)))
            assert endless.recv(65536).startswith(b"HTTP/1.1 413")
        with connected(server, FORM.encode() + b"content-length: " + b"9" * 15_000 + b"\r\n\r\n") as absurd:
            assert absurd.recv(65536).startswith(b"HTTP/1.1 4")
        assert is_well(server)


def test_an_upload_goes_on_after_its_answer_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    with served(FakeModel(), Limits(upload=1000)) as server, connected(server, CHUNKED) as endless:
        start = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - start < 10:
                endless.sendall(chunk(bytes(1000)))
                time.sleep(0.01)
        assert time.monotonic() - start < 5
        assert recovers(server)


def test_uploads_share_a_bounded_memory_and_give_it_back() -> None:
    limits = Limits(queue=1, upload=100_000)  # and 65,536 bytes for the fields
    with served(FakeModel(), limits) as server:
        for _ in range(3):
            with connected(server, CHUNKED + chunk(bytes(150_000))), connected(server, CHUNKED) as second:
                waited(lambda: server.metric("tokenprune_upload_bytes") == 150_000)
                second.sendall(chunk(bytes(30_000)))
                assert second.recv(65536).startswith(b"HTTP/1.1 503")
            waited(lambda: server.metric("tokenprune_upload_bytes") == 0)
        refused(server.post(bytes(90_000), query="it"), 415)
        assert is_well(server)


def test_clients_that_leave_in_the_middle() -> None:
    with served(FakeModel(), Limits(queue=1)) as server:
        for sent in (b"POST", CHUNKED, CHUNKED + chunk(b"--b\r\n"), FORM.encode() + b"content-length: 100\r\n\r\n--b"):
            for _ in range(5):
                with connected(server, sent):
                    pass
        left = 'tokenprune_requests_total{route="/segment",status="499"}'
        waited(lambda: server.metric(left) >= 15 and not server.server.server_state.connections)
        assert server.metric(left) == 15
        assert is_well(server)


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    with served(FakeModel(), Limits(seconds=0.5)) as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(0.2)
        deaf.connect(server.address)
        with suppress(TimeoutError, OSError):
            for _ in range(5000):
                deaf.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
        waited(lambda: not server.server.server_state.connections)
        assert recovers(server)


def test_more_connections_than_the_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SPARE", 3)
    with served(FakeModel(), Limits(queue=2)) as server, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connected(server))
        waited(lambda: len(server.server.server_state.connections) == 5)
        refused(server.get("/health"), 503, "5 connections are open")
        stack.close()
        waited(lambda: not server.server.server_state.connections)
        assert is_well(server)


@pytest.mark.slow
def test_many_clients_among_slow_ones() -> None:
    """Good, bad and slow clients: each good one gets its own mask, perhaps after 503s, and each bad one its refusal."""
    model: Any = tp.load("lisa-tiny")
    scenes = list(Shapes().scenes("test", limit=4, seed=11))
    files = [encoded(Image.fromarray(scene.image)) for scene in scenes]
    wanted = [model.segment(scene.image, scene.queries[0].text).masks[0].numpy() for scene in scenes]
    with served(model, Limits(queue=8, seconds=300.0)) as server, ExitStack() as stack:
        for number in range(200):
            stack.enter_context(connected(server, b"POST /seg" if number % 2 else CHUNKED + chunk(b"--b")))

        def ask(number: int) -> tuple[str, int]:
            place, sent_away = number % len(scenes), 0
            file = b"no picture" if number % 10 == 9 else files[place]
            while (answer := server.post(file, query=scenes[place].queries[0].text)).status_code == 503:
                sent_away += 1
                time.sleep(float(answer.headers["retry-after"]))
            if answer.status_code != 200:
                return str(answer.status_code), sent_away
            return ("exact" if np.array_equal(decoded(answer), wanted[place]) else "wrong"), sent_away

        with ThreadPoolExecutor(20) as clients:
            found = list(clients.map(ask, range(40)))
    print(f"{sum(times for _, times in found)} times 503")
    assert [kind for kind, _ in found] == ["415" if number % 10 == 9 else "exact" for number in range(40)]
