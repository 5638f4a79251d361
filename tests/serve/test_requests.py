"""What a server answers to requests, good and bad, over HTTP."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fake_segmentation import FakeModel
from glamm_checkpoints import write_glamm
from PIL import Image
from pixellm_checkpoints import write_pixellm
from serving import SECONDS, Gated, Served, decoded, encoded, picture, refused, served, waited

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes
from tokenprune.errors import OptionError, PluginError
from tokenprune.serve.limits import Limits
from tokenprune.serve.strategies import Choices

LIMITS = Limits(queue=64, upload=300_000, pixels=40_000, seconds=30)
MIXED: list[dict[str, str]] = [
    {},
    {"strategy": "csp", "budget": "0.35"},
    {"strategy": "fastv:layer=3", "budget": "0.5"},
    {"strategy": "prumerge+", "budget": "0.35"},
    {"strategy": "none"},
]


@pytest.fixture(scope="module")
def fake() -> Iterator[Served]:
    """A server of the fake model."""
    with served(FakeModel(), LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def model() -> Any:
    return tp.load("lisa-tiny")


def picture_of(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def strategy_of(given: dict[str, str]) -> tp.Strategy | None:
    if "strategy" not in given:
        return None
    options = {"layer": 3} if "layer" in given["strategy"] else {}
    budget = float(given["budget"]) if "budget" in given else None
    return tp.strategy(given["strategy"].partition(":")[0], budget, **options)


def test_masks_of_clients_at_once_are_those_of_direct_calls(model: Any) -> None:
    """With mixed strategies, and bad requests in between, which fail alone."""
    scenes = list(Shapes().scenes("test", limit=6, seed=5))
    good = [(scene.image, scene.queries[0].text, MIXED[number % len(MIXED)]) for number, scene in enumerate(scenes * 2)]
    bad = [{"query": "a [SEG] of it"}, {"query": "it", "strategy": "fastvv"}, {"query": "word " * 1000}]
    with served(model, Limits(batch=4)) as server, ThreadPoolExecutor(8) as clients:
        sent, wrong = [], []
        for number, (image, query, given) in enumerate(good):
            sent.append(clients.submit(server.post, encoded(Image.fromarray(image)), query=query, **given))
            wrong.append(clients.submit(server.post, encoded(Image.fromarray(image)), **bad[number % len(bad)]))
        answers, failed = ([future.result() for future in some] for some in (sent, wrong))
        assert server.metric('tokenprune_requests_total{route="/segment",status="200"}') == len(good)
        assert server.metric('tokenprune_requests_total{route="/segment",status="422"}') == len(good)
        assert server.metric("tokenprune_queue_length") == 0
        total = sum(answer.json()["equivalent_tokens"] for answer in answers)
        assert server.metric("tokenprune_kept_tokens_total") == pytest.approx(total)
        assert server.metric("tokenprune_image_tokens_total") == 256 * len(good)
    for number, answer in enumerate(failed):
        refused(answer, 422, ("contains [SEG]", "did you mean 'fastv'", "shorten the prompt")[number % len(bad)])
    for (image, query, given), answer in zip(good, answers, strict=True):
        direct = model.segment(image, query, strategy_of(given))
        assert np.array_equal(decoded(answer), direct.masks[0].numpy())
        said = answer.json()
        ledger = (direct if direct.trace else model.segment(image, query, tp.strategy("none"))).trace.ledger
        assert said["equivalent_tokens"] == ledger.equivalent_tokens
        assert said["layer_tokens"] == [entry.image[0] for entry in ledger.entries]
        assert (said["image_tokens"], said["text"]) == (256, direct.text)
        assert said["strategy"] == given.get("strategy", "none").partition(":")[0]
    assert len({answer.json()["equivalent_tokens"] for answer in answers}) == 4  # they did differ


@pytest.mark.parametrize("write", [write_glamm, write_pixellm])
def test_masks_of_other_families(write: Callable[[Path], Path], tmp_path: Path) -> None:
    write(tmp_path / "model")
    model: Any = tp.load(tmp_path / "model")
    direct = model.segment(picture_of(picture()), "the red ring", tp.strategy("fastv", budget=0.5, layer=1))
    with served(model) as server:
        answer = server.post(picture(), query="the red ring", strategy="fastv:layer=1", budget="0.5")
    assert np.array_equal(decoded(answer), direct.masks.any(0).numpy())
    assert answer.json()["equivalent_tokens"] == direct.trace.ledger.equivalent_tokens


def test_a_picture_is_turned_upright_as_in_direct_calls(model: Any, tmp_path: Path) -> None:
    image = picture_of(picture(size=(40, 64)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    with served(model) as server:
        mask = decoded(server.post((tmp_path / "turned.jpg").read_bytes(), query="the red ring"))
    assert mask.shape == (64, 40)
    assert np.array_equal(mask, model.segment(tmp_path / "turned.jpg", "the red ring").masks[0].numpy())


def test_a_request_that_names_no_strategy_gets_the_servers_own() -> None:
    with served(FakeModel(), LIMITS, Choices("fastv", 0.5, layer=1)) as server:
        found = [server.post(picture(), query="it", **given).json() for given in ({}, {"budget": "0.9"})]
        named = server.post(picture(), query="it", strategy="none").json()
    assert [(one["strategy"], one["budget"]) for one in found] == [("fastv", 0.5), ("fastv", 0.9)]
    assert (named["strategy"], named["budget"], named["equivalent_tokens"]) == ("none", None, 36)


def test_health_strategies_and_metrics(fake: Served) -> None:
    about = {"status": "ok", "model": "fake", "route": "/segment", "version": tp.__version__}
    assert fake.get("/health").json() == about
    assert set(fake.get("/strategies").json()) == set(tp.strategies())
    found = fake.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=")
    for name in ("request_seconds_sum", "queue_seconds_sum", "model_seconds_sum", "queue_length", "kept_tokens_total"):
        assert f"tokenprune_{name}" in found.text


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_formats_that_are_read(fake: Served, kind: str) -> None:
    assert decoded(fake.post(picture(kind), query="it")).shape == (24, 32)


# what is refused: docs/serving.md lists it ----------------------------------------------------------------------------


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is that large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    whole = picture("JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * 200 + b"\xff\xd9"


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) run\nshowpage\n"
GREYS = encoded(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF")
PATHS = ("/etc/passwd", "../../etc/passwd", "os:system", "file:///etc/passwd")


@pytest.mark.parametrize(
    ("image", "fields", "status", "part"),
    [
        (b"no picture", {"query": "it"}, 415, "no picture found"),
        (b"", {"query": "it"}, 415, "no picture found"),
        (PROGRAM, {"query": "it"}, 415, "no picture found"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"query": "it"}, 415, "no picture found"),
        (picture()[:60], {"query": "it"}, 422, "image cannot be read"),
        (GREYS, {"query": "it"}, 422, "image has the mode 'F'"),
        (claims(300, 200), {"query": "it"}, 413, "more than 40000 pixels"),
        (claims(60_000, 60_000), {"query": "it"}, 413, "more than 40000 pixels"),
        (many_scans(), {"query": "it"}, 422, "more than 100 scans"),
        (bytes(LIMITS.body), {"query": "it"}, 413, "more than 0.286102 MB"),
        (picture(), {}, 422, "field 'query' is missing"),
        (picture(), {"query": " "}, 422, "query"),
        (picture(), {"query": "x" * 8001}, 422, "at most 8000 characters"),
        (picture(), {"query": "it", "budget": "half"}, 422, "field 'budget': 'half' found"),
        (picture(), {"query": "it", "budget": "nan", "strategy": "fastv"}, 422, "(0, 1]"),
        (picture(), {"query": "it", "budget": "0.5"}, 422, "moves nothing for strategy 'none'"),
        (picture(), {"query": "it", "strategy": "fastvv"}, 422, "did you mean 'fastv'"),
        (picture(), {"query": "it", "strategy": "cdpruner"}, 422, "cdpruner"),
        (picture(), {"query": "it", "budgt": "0.5"}, 422, "unknown field 'budgt'"),
        (picture(), {"query": ["it", "that"]}, 422, "'query' is given twice"),
        *((picture(), {"query": "it", "strategy": path}, 422, "strategy") for path in PATHS),
        *(
            (picture(), {"query": "it", "strategy": f"csp:clustering=seg_first,segmenter={path}"}, 422, "'segmenter'")
            for path in PATHS
        ),
        *((picture(), {"query": "it", "segmenter": path}, 422, "unknown field 'segmenter'") for path in PATHS),
        (picture(), {"query": "it", "strategy": "csp:query=/etc/passwd"}, 422, "no name of query rows"),
        (picture(), {"query": "it", "strategy": "+".join(["uniform"] * 3000)}, 422, "expected at most 200"),
    ],
)
def test_what_is_refused(fake: Served, image: bytes, fields: dict[str, Any], status: int, part: str) -> None:
    refused(fake.post(image, **fields), status, part)


@pytest.mark.parametrize("path", PATHS)
def test_words_and_file_names_are_never_paths(fake: Served, path: str) -> None:
    """A query is words, and the name of an upload is not looked at."""
    files = {"image": (path, picture())}
    named = httpx.post(f"{fake.url}/segment", files=files, data={"query": path}, trust_env=False, verify=False)
    assert np.array_equal(decoded(named), decoded(fake.post(picture(), query=path)))
    as_text = httpx.post(
        f"{fake.url}/segment", files={"query": (None, "it"), "image": (None, path)}, trust_env=False, verify=False
    )
    refused(as_text, 422, "field 'image'")
    assert path.split("/")[-1] not in fake.get(f"/{path}").text


@pytest.mark.parametrize(
    ("body", "kind", "status", "part"),
    [
        (b"{}", "application/json", 415, "multipart/form-data"),
        (b"query=it", "application/x-www-form-urlencoded", 415, "multipart/form-data"),
        (b"", "", 415, "multipart/form-data"),
        (b"x", "multipart/form-data", 400, "boundary"),
        (b"x", "multipart/form-data; boundary=b", 400, ""),
        (
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
            400,
            "name",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="query"\r\n\r\nit',
            "multipart/form-data; boundary=b",
            422,
            "image",
        ),
        (b"--b\r\n" + b"X: y\r\n" * 50_000, "multipart/form-data; boundary=b", 400, ""),
        (
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n' * 1200,
            "multipart/form-data; boundary=b",
            400,
            "1000",
        ),
    ],
)
def test_broken_forms(fake: Served, body: bytes, kind: str, status: int, part: str) -> None:
    headers = {"content-type": kind} if kind else {}
    refused(
        httpx.post(f"{fake.url}/segment", content=body, headers=headers, trust_env=False, verify=False), status, part
    )


def test_other_routes_and_methods(fake: Served) -> None:
    refused(fake.get("/nowhere"), 404)
    refused(fake.get("/segment"), 405)
    refused(fake.post(picture(), "/segment/", query="it"), 404)
    refused(httpx.delete(f"{fake.url}/health", trust_env=False, verify=False), 405)
    refused(fake.post(picture(), "/answer", query="it"), 404, "'fake' makes masks; use /segment")
    refused(fake.post(picture(), "/segment?strategy=fastv", query="it"), 422, "as fields of the form")
    assert fake.get("/docs").status_code == 404  # FastAPI's, which loads scripts from elsewhere
    assert not re.search(r'route="(?!/segment|/health|/strategies|/metrics|other")', fake.get("/metrics").text)


def test_a_failure_of_the_server_is_no_message_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """Errors that are not the client's may hold paths; the log has them."""

    class Broken(FakeModel):
        def segment(self, image: Any, query: Any = None, strategy: Any = None, *, is_sentence: Any = None) -> Any:
            raise {"os": OSError, "plugin": PluginError}[query]("/srv/secret/weights is broken")

    with served(Broken(), LIMITS) as server:
        for query in ("os", "plugin"):
            refused(server.post(picture(), query=query), 500, "the server failed; its log says why")
        assert server.get("/health").status_code == 200
        assert server.metric('tokenprune_requests_total{route="/segment",status="500"}') == 2
    assert caplog.text.count("/srv/secret/weights is broken") >= 2


def test_what_is_wrong_with_the_servers_own_strategy_is_not_the_clients_fault() -> None:
    class Unsuitable(FakeModel):
        def segment(self, image: Any, query: Any = None, strategy: Any = None, *, is_sentence: Any = None) -> Any:
            raise OptionError("segmenter '/srv/secret/weights' cannot be loaded")

    with served(Unsuitable(), LIMITS, Choices("fastv")) as server:
        refused(server.post(picture(), query="it"), 500, "the server failed")
        refused(server.post(picture(), query="it", strategy="uniform"), 422, "cannot be loaded")


# load -----------------------------------------------------------------------------------------------------------------


def test_more_requests_than_the_queue_takes_are_sent_away() -> None:
    model = Gated()
    with served(model, Limits(queue=3, batch=1)) as server, ThreadPoolExecutor(3) as clients:
        sent = [clients.submit(server.post, picture(), query=f"number {number}") for number in range(3)]
        assert model.began.wait(SECONDS)
        waited(lambda: server.metric("tokenprune_queue_length") == 2)
        late = server.post(picture(), query="late")
        refused(late, 503, "3 requests are waiting")
        assert late.headers["retry-after"] == "1"
        assert server.get("/health").status_code == 200
        model.gate.set()
        assert all(future.result().status_code == 200 for future in sent)
        assert server.post(picture(), query="again").status_code == 200


def test_a_request_that_waits_too_long_is_told_and_not_run() -> None:
    model = Gated()
    with served(model, Limits(batch=1, seconds=0.5)) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.post, picture(), query="first")
        assert model.began.wait(SECONDS)
        second = server.post(picture(), query="second")
        refused(second, 503, "no turn in 0.5 seconds")
        assert second.headers["retry-after"] == "1"
        refused(first.result(), 504, "no answer in 0.5 seconds")
        model.gate.set()
        waited(lambda: server.post(picture(), query="third").status_code == 200)
    assert set(model.queries) == {"first", "third"}


def test_a_client_that_leaves_is_not_worked_for() -> None:
    model = Gated()
    with served(model, Limits(batch=1)) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.post, picture(), query="first")
        assert model.began.wait(SECONDS)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/segment",
                files={"image": ("a.png", picture())},
                data={"query": "second"},
                timeout=httpx.Timeout(60, read=0.5),
                trust_env=False,
                verify=False,
            )
        waited(lambda: server.metric('tokenprune_requests_total{route="/segment",status="499"}') == 1)
        model.gate.set()
        assert first.result().status_code == 200
    assert model.queries == ["first"]


def test_a_server_that_stops_answers_what_it_has() -> None:
    model = Gated()
    with ThreadPoolExecutor(3) as clients:
        with served(model, Limits(batch=1)) as server:
            sent = [clients.submit(server.post, picture(), query=f"number {number}") for number in range(3)]
            assert model.began.wait(SECONDS)
            waited(lambda: server.metric("tokenprune_queue_length") == 2)
            server.server.should_exit = True
            waited(lambda: not server.server.servers[0].is_serving())
            with pytest.raises(httpx.ConnectError):
                server.get("/health")
            model.gate.set()
        answers = [future.result() for future in sent]
    direct = FakeModel().segment(np.asarray(picture_of(picture())), "number 1").masks[0]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert torch.equal(torch.from_numpy(decoded(answers[1])), direct)
