"""The server under uvicorn, on loopback: eight clients at once, and every mask is the one that a single caller gets."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes


def needed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"the server's tests need {name}: pip install -e '.[dev]'")


for name in ("fastapi", "python_multipart"):
    needed(name)
httpx, uvicorn = needed("httpx"), needed("uvicorn")
sys.path.insert(0, str(Path(__file__).parents[1]))
server = importlib.import_module("server")

CLIENTS = 8
EACH = int(os.environ.get("REQUESTS_OF_EACH_CLIENT", "5"))
SECONDS = 300
STRATEGIES: list[dict[str, str]] = [
    {},
    {"strategy": "csp", "budget": "0.35"},
    {"strategy": "fastv", "budget": "0.5"},
    {"strategy": "prumerge+", "budget": "0.35"},
    {"strategy": "none"},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tp.load("lisa-tiny")


@contextmanager
def served(model: Any) -> Iterator[tuple[str, Any]]:
    """The address of a server, and the server."""
    running = uvicorn.Server(
        uvicorn.Config(server.create_app(model, 8), host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    for _ in range(300):
        if running.started or not thread.is_alive():
            break
        time.sleep(0.1)
    assert running.started, "the server did not start"
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", running
    finally:
        running.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(model: Any) -> Iterator[str]:
    """Where the server listens."""
    with served(model) as (address, _):
        yield address


def png(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def mask_of(rle: dict[str, Any]) -> np.ndarray:
    """Runs, painted one after the other."""
    painted = [np.full(count, number % 2 == 1) for number, count in enumerate(rle["counts"])]
    return np.concatenate(painted).reshape(rle["size"])


def post(address: str, image: bytes, **fields: str) -> Any:
    return httpx.post(f"{address}/segment", files={"image": ("a.png", image)}, data=fields, timeout=SECONDS)


def test_eight_clients_with_mixed_strategies(model: Any, address: str) -> None:
    scenes = list(Shapes().scenes("test", limit=12, seed=5))
    requests = []
    for number in range(CLIENTS * EACH):
        scene = scenes[number % len(scenes)]
        requests.append((scene.image, scene.queries[0].text, STRATEGIES[number % len(STRATEGIES)]))
    alone = []
    for image, query, given in requests:
        chosen = (
            tp.strategy(given["strategy"], float(given["budget"]) if "budget" in given else None) if given else None
        )
        alone.append(model.segment(image, query, chosen))
    with ThreadPoolExecutor(CLIENTS) as clients:
        sent = [clients.submit(post, address, png(image), query=query, **given) for image, query, given in requests]
        answers = [future.result(SECONDS) for future in sent]
    errors = [answer.text for answer in answers if answer.status_code != 200]
    assert not errors
    equal = 0
    for answer, expected in zip(answers, alone, strict=True):
        said = answer.json()
        (mask,) = (mask_of(rle) for rle in said["masks"])
        equal += np.array_equal(mask, expected.masks[0].numpy())
        tokens = None if expected.trace is None else expected.trace.ledger.equivalent_tokens
        assert said["equivalent_tokens"] == tokens
    print(f"{len(answers)} requests, {len(errors)} errors, {equal} masks equal to the sequential ones")
    assert equal == len(answers)
    assert len({answer.json()["equivalent_tokens"] for answer in answers}) >= 3  # they did differ


def test_bad_requests_among_good_ones_fail_alone(model: Any, address: str) -> None:
    scenes = list(Shapes().scenes("test", limit=20, seed=7))
    good = [(scene.image, scene.queries[0].text) for scene in scenes]
    bad = {"a [SEG] of it": "contains [SEG]", "word " * 5000: "shorten the prompt"}
    requests = [(*good[0], "")]
    for (image, query), (wrong, problem) in zip(good, itertools.cycle(bad.items()), strict=False):
        requests += [(image, query, ""), (image, wrong, problem)]
    with ThreadPoolExecutor(len(requests)) as clients:
        sent = [clients.submit(post, address, png(image), query=query) for image, query, _ in requests]
        answers = [future.result(SECONDS) for future in sent]
    for (image, query, problem), answer in zip(requests, answers, strict=True):
        assert answer.status_code == (422 if problem else 200), answer.text
        if problem:
            assert problem in answer.json()["detail"]
        else:
            (mask,) = map(mask_of, answer.json()["masks"])
            assert np.array_equal(mask, model.segment(image, query).masks[0].numpy())


def test_too_many_requests_are_refused_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_REQUESTS", 0)
    answer = post(address, PICTURE, query="it")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "try again" in answer.json()["detail"]
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    monkeypatch.undo()
    assert post(address, PICTURE, query="it").status_code == 200  # every request that came has left


def test_a_server_that_stops_answers_what_it_has(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that are connected get their masks, and no thread stays."""
    many, began = model.segment_many, threading.Event()

    def slow(*given: Any, **options: Any) -> Any:
        began.set()
        time.sleep(0.3)
        return many(*given, **options)

    monkeypatch.setattr(model, "segment_many", slow)
    scene = next(iter(Shapes().scenes("test", limit=1, seed=5)))
    query = scene.queries[0].text
    with ThreadPoolExecutor(4) as clients:
        with served(model) as (address, running):
            sent = [clients.submit(post, address, png(scene.image), query=query) for _ in range(4)]
            assert began.wait(SECONDS)
            running.should_exit = True
        answers = [future.exception(SECONDS) or future.result() for future in sent]
    # one that had not been accepted yet is refused by the operating system
    masks = [mask_of(answer.json()["masks"][0]) for answer in answers if not isinstance(answer, httpx.TransportError)]
    assert masks
    assert all(np.array_equal(mask, model.segment(scene.image, query).masks[0].numpy()) for mask in masks)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health")


def test_a_picture_of_the_mask(model: Any, address: str) -> None:
    scene = next(iter(Shapes().scenes("test", limit=1, seed=5)))
    query = scene.queries[0].text
    answer = post(address, png(scene.image), query=query, output="png")
    assert answer.headers["content-type"] == "image/png"
    mask = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.array_equal(mask, model.segment(scene.image, query).masks[0].numpy())


def test_health_and_strategies(address: str) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "lisa-tiny"}
    known = httpx.get(f"{address}/strategies").json()
    assert set(known) == set(tp.strategies())
    assert all(known.values())


PICTURE = png(np.zeros((32, 32, 3), dtype=np.uint8))
UNSCALED = png(np.zeros((32, 32), dtype=np.float32), "TIFF")


@pytest.mark.parametrize(
    ("image", "fields", "status", "message"),
    [
        (PICTURE, {"query": "it", "strategy": "fastvv"}, 404, "did you mean 'fastv'"),
        (PICTURE, {"query": " "}, 422, "query"),
        (PICTURE, {"query": "it", "strategy": "fastv", "budget": "1.5"}, 422, "1.5"),
        (PICTURE, {"query": "it", "budget": "0.5"}, 422, "without a strategy"),
        (
            PICTURE,
            {"query": "it", "budget": "half"},
            422,
            "field 'budget': 'half' found; Input should",
        ),
        (PICTURE, {}, 422, "field 'query' is missing; give it a value"),
        (UNSCALED, {"query": "it"}, 422, "picture 'a.png' has the mode 'F'"),
        (PICTURE, {"query": "it", "output": "jpg"}, 422, "'rle' or 'png'"),
        (b"no picture", {"query": "it"}, 422, "no picture that can be read"),
        (PICTURE[:60], {"query": "it"}, 422, "no picture that can be read"),
        (bytes(server.LARGEST_UPLOAD + server.ROOM_FOR_WORDS), {"query": "it"}, 413, "smaller picture"),
    ],
)
def test_what_a_client_gets_wrong(
    address: str, image: bytes, fields: dict[str, str], status: int, message: str
) -> None:
    answer = post(address, image, **fields)
    assert answer.status_code == status
    assert message in str(answer.json()["detail"])
    assert isinstance(answer.json()["detail"], str)


def test_a_request_has_to_say_its_length(address: str) -> None:
    chunks = (b"x" for _ in range(3))
    assert httpx.post(f"{address}/segment", content=chunks).status_code == 411


def test_a_picture_of_too_many_pixels(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LARGEST_IMAGE", 1000)
    assert post(address, PICTURE, query="it").status_code == 413


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths(seed: int) -> None:
    mask = np.random.default_rng(seed).random((5, 7)) < (0.0, 1.0, 0.5, 0.1, 0.9)[seed]
    found = server.as_rle(mask).model_dump()
    assert np.array_equal(mask_of(found), mask)
    assert all(found["counts"][1:])
