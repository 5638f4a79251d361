"""A server of a model that answers in words."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Served, picture, refused, served
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LLaVA from a folder."""
    return tp.load(write_vlm(tmp_path_factory.mktemp("vlm") / "llava", "llava"))


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Served]:
    with served(model) as found:
        yield found


def test_answers_of_clients_at_once_are_those_of_direct_calls(model: Any, server: Served) -> None:
    requests = [({"strategy": "fastv", "budget": "0.5"}, 6), ({}, 4), ({"strategy": "uniform"}, 6)] * 3
    with ThreadPoolExecutor(6) as clients:
        sent = [
            clients.submit(
                server.post,
                picture(size=(48, 64), seed=number),
                "/answer",
                query="What is it?",
                max_new_tokens=limit,
                **given,
            )
            for number, (given, limit) in enumerate(requests)
        ]
        answers = [future.result() for future in sent]
    for number, (given, limit) in enumerate(requests):
        strategy = tp.strategy(given.get("strategy", "none"), float(given["budget"]) if "budget" in given else None)
        image = Image.open(io.BytesIO(picture(size=(48, 64), seed=number)))
        said = model.answer(image, "What is it?", strategy, max_new_tokens=limit)
        found = answers[number].json()
        assert answers[number].status_code == 200, found
        assert "mask" not in found
        assert found["text"] == said.text
        assert found["layer_tokens"] == [entry.image[said.row] for entry in said.trace.ledger.entries]
        assert found["equivalent_tokens"] == said.trace.ledger.equivalent_tokens


def test_health_names_the_folder_and_not_its_path(server: Served) -> None:
    assert (server.get("/health").json()["model"], server.get("/health").json()["route"]) == ("llava", "/answer")


@pytest.mark.parametrize(
    ("route", "fields", "status", "part"),
    [
        ("/segment", {"query": "it"}, 404, "'llava' answers in words; use /answer"),
        ("/answer", {"query": "it", "max_new_tokens": "0"}, 422, "max_new_tokens"),
        ("/answer", {"query": "it", "max_new_tokens": "513"}, 422, "max_new_tokens"),
        ("/answer", {"query": "it", "max_new_tokens": "many"}, 422, "max_new_tokens"),
        ("/answer", {"query": "<image><image> what?"}, 422, "placeholders"),
        ("/answer", {"query": "  "}, 422, "prompt"),
    ],
)
def test_what_is_refused(server: Served, route: str, fields: dict[str, str], status: int, part: str) -> None:
    refused(server.post(picture(), route, **fields), status, part)


def test_pictures_on_paths_are_not_read(server: Served, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    refused(server.post(str(tmp_path / "a.png").encode(), "/answer", query="it"), 415, "no picture found")
