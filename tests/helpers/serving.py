"""Servers on loopback, in a thread or in a process of their own, and what tests send to them."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import uvicorn
from fake_segmentation import FakeModel
from PIL import Image
from pycocotools import mask as coco

from tokenprune.serve.limits import Limits
from tokenprune.serve.server import config_of
from tokenprune.serve.strategies import Choices
from tokenprune.utils.sockets import opened, url_of

SECONDS = 300


@dataclass(frozen=True)
class Served:
    """A server in a thread."""

    url: str
    server: uvicorn.Server

    @property
    def address(self) -> tuple[str, int]:
        """For sockets."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def post(self, image: bytes, route: str = "/segment", **fields: Any) -> httpx.Response:
        """An upload."""
        return httpx.post(
            f"{self.url}{route}",
            files={"image": ("a.png", image)},
            data=fields,
            timeout=SECONDS,
            trust_env=False,
            verify=False,
        )

    def get(self, route: str) -> httpx.Response:
        """A request without one."""
        return httpx.get(f"{self.url}{route}", timeout=SECONDS, trust_env=False, verify=False)

    def metric(self, name: str) -> float:
        """A value of `/metrics`; 0 for one that is not there yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def served(model: Any, limits: Limits | None = None, choices: Choices | None = None) -> Iterator[Served]:
    """A server on a free port, which drains at the end."""
    listening = opened("127.0.0.1", 0)
    server = uvicorn.Server(config_of(model, choices, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    waited(lambda: server.started or not thread.is_alive())
    assert server.started, "the server did not start"
    try:
        yield Served(url_of(listening), server)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
    assert not thread.is_alive(), "the server did not stop"


@contextmanager
def process(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tokenprune serve` in a process, and its URL."""
    command = [sys.executable, "-m", "tokenprune", "serve", *map(str, arguments), "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.search(r"serving \S+ on (http://127\.0\.0\.1:\d+)$", line.strip())
        assert found is not None, f"{line}{running.communicate(timeout=SECONDS)[1] if not line else ''}"
        yield running, found[1]
    finally:
        running.kill()
        running.communicate()


class Gated(FakeModel):
    """The fake model, which waits in `segment` until `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.gate = threading.Event(), threading.Event()
        self.queries: list[str] = []

    def segment(self, image: Any, query: Any = None, strategy: Any = None, *, is_sentence: Any = None) -> Any:
        """See `FakeModel`."""
        self.queries.append(query)
        self.began.set()
        assert self.gate.wait(SECONDS)
        return super().segment(image, query, strategy)


def waited(condition: Any, seconds: float = SECONDS) -> None:
    """Until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def picture(kind: str = "PNG", size: tuple[int, int] = (24, 32), seed: int = 0, **options: Any) -> bytes:
    """A file of noise, size (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(answer: httpx.Response) -> np.ndarray[Any, Any]:
    """The mask of an answer, bool [H, W]."""
    assert answer.status_code == 200, answer.text
    return coco.decode(answer.json()["mask"]).astype(bool)  # type: ignore[no-any-return]


def refused(answer: httpx.Response, status: int, *parts: str) -> None:
    """Check that it is JSON with one line of detail that holds these parts, and no path of this machine."""
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert set(answer.json()) == {"detail"}
    assert isinstance(detail, str)
    assert len(detail.splitlines()) == 1
    assert "Traceback" not in detail
    for part in parts:
        assert part in detail, detail
