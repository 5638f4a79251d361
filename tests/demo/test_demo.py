"""What the demo's page runs and shows, without a browser."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_segmentation import FakeModel
from PIL import Image

import tokenprune as tp
from tokenprune import hookimpl
from tokenprune.demo.offered import Offer, offers_for, requested
from tokenprune.demo.pictures import LONGEST, Single, about_file, about_scene, example_scenes
from tokenprune.demo.run import BUDGETS, Result, curve, once
from tokenprune.demo.server import address, app_of
from tokenprune.demo.session import Session
from tokenprune.demo.view import message, numbers, picture, side
from tokenprune.errors import BudgetError, InputError, OptionError
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.metrics import agreement
from tokenprune.plugins import registry
from tokenprune.utils.sockets import opened

CSP, FASTV, NONE = Offer("csp", "", True), Offer("fastv", "", True), Offer("none", "", False)
SCENES = example_scenes()
FIRST = next(iter(SCENES))


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(scope="module")
def session(model: FakeModel) -> Session:
    return Session(model)


@pytest.fixture(scope="module")
def result(model: FakeModel) -> Result:
    scene, number = SCENES[FIRST]
    asked = about_scene(scene, scene.queries[number].text)
    return once(model, asked, [partial(requested, CSP, 0.5), partial(requested, FASTV, 0.4)])


# what is offered -----------------------------------------------------------------------------------------------------


class Broken:
    """A plugin whose strategy cannot be imported."""

    @hookimpl
    def tokenprune_register_strategies(self, register: Any) -> None:
        register("broken-one", "no_such_module:Thing", summary="x")


@pytest.fixture
def _broken_plugin() -> Iterator[None]:
    registry.register_plugin(Broken(), "broken")
    yield
    registry.unregister_plugin("broken")


@pytest.mark.usefixtures("_broken_plugin")
def test_only_strategies_that_run_on_the_model_are_offered() -> None:
    model = tp.load("lisa-tiny")
    offers = offers_for(model)
    assert "broken-one" in tp.strategies()
    assert [*offers] == [name for name in tp.strategies() if name != "broken-one" and tp.compatible(name, model)]
    assert "cdpruner" not in offers
    assert offers["csp"].takes_budget
    assert not offers["none"].takes_budget
    assert not offers["csp-65"].takes_budget  # it has its own
    assert offers["csp"].summary


def test_what_is_requested() -> None:
    assert repr(requested(CSP, 0.35, "query=seg")) == repr(tp.strategy("csp", budget=0.35, query="seg"))
    assert requested(NONE, 0.35).budget is None
    with pytest.raises(OptionError, match="quary"):
        requested(CSP, 0.35, "quary=seg")
    with pytest.raises(OptionError, match="move the slider"):
        requested(CSP, 0.35, "budget=0.2")
    with pytest.raises(OptionError, match="expected key=value"):
        requested(CSP, 0.35, "seg")
    with pytest.raises(BudgetError):
        requested(CSP, 0.0)


# pictures ------------------------------------------------------------------------------------------------------------


def test_a_target_is_known_for_queries_of_the_scene_alone() -> None:
    scene, number = SCENES[FIRST]
    query = scene.queries[number]
    known = about_scene(scene, f" {query.text} ")
    assert known.has_target
    assert known.scene.queries == [query]
    unknown = about_scene(scene, "the thing that is not there.")
    assert not unknown.has_target
    (asked,) = unknown.scene.queries
    assert (asked.text, asked.is_sentence, asked.mask.any()) == ("the thing that is not there.", True, False)
    with pytest.raises(InputError, match="query is empty"):
        about_scene(scene, "  ")


def test_uploaded_pictures_are_upright_and_reduced(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (2000, 1000)).save(tmp_path / "photo.jpg", exif=exif)
    asked = about_file(tmp_path / "photo.jpg", "a thing")
    assert asked.scene.image.shape == (LONGEST, LONGEST // 2, 3)
    (tmp_path / "bad.png").write_text("text")
    with pytest.raises(InputError) as caught:
        about_file(tmp_path / "bad.png", "a thing")
    assert "bad.png" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


# what is run ---------------------------------------------------------------------------------------------------------


def test_numbers_and_masks_are_those_of_a_comparison(model: FakeModel, result: Result) -> None:
    scene, number = SCENES[FIRST]
    strategies = [tp.strategy("none"), tp.strategy("csp", budget=0.5), tp.strategy("fastv", budget=0.4)]
    data = Single(scene.only([number]))
    rows = compare(model, data, strategies, split="only", limit=1, timing_samples=0).rows
    ran = [result.untouched, *result.sides]
    assert [one.label for one in ran] == ["none", "csp at 0.5", "fastv at 0.4"]
    for one, row, strategy in zip(ran, rows, strategies, strict=True):
        assert one.row is not None
        assert one.outcome is not None
        for name in ("giou", "agreement", "equivalent_tokens", "flops", "kv_bytes"):
            assert getattr(one.row, name) == pytest.approx(getattr(row, name))
        assert one.row.prefill_ms is not None
        mask = model.segment(scene.image, [scene.queries[number].text], strategy).masks[0].numpy()
        assert (one.outcome.mask == mask).all()
    assert result.record.target is not None


def test_a_strategy_that_cannot_run_leaves_the_other(model: FakeModel) -> None:
    asked = about_scene(SCENES[FIRST][0], "the red ring")
    found = once(model, asked, [partial(requested, FASTV, 0.01), partial(requested, CSP, 0.5)])
    assert "the smallest possible budget is" in found.sides[0].problem
    assert found.sides[0].outcome is None
    assert found.sides[1].problem == ""
    found = once(model, asked, [partial(requested, FASTV, 0.5), partial(requested, CSP, 0.5, "x=1")])
    assert "unknown option 'x'" in found.sides[1].problem
    assert found.sides[0].outcome is not None
    found = once(model, asked, [partial(requested, Offer("cdpruner", "", True), 0.5)] * 2)
    assert all("requires Clip" in one.problem and "\n" not in one.problem for one in found.sides)
    assert found.untouched.outcome is not None


def test_nothing_is_said_of_a_target_that_is_not_known(model: FakeModel) -> None:
    found = once(model, about_scene(SCENES[FIRST][0], "the red ring"), [partial(requested, CSP, 0.5)])
    assert "IoU " not in picture(found) + numbers(found) + side(found.sides[0], found)
    assert "target" not in re.findall(r"<figcaption>([^<,]*)", picture(found))
    assert "agreement" in numbers(found)


def test_equal_sides_run_once(model: FakeModel) -> None:
    asked = about_scene(SCENES[FIRST][0], "the red ring")
    found = once(model, asked, [partial(requested, NONE, 0.5), partial(requested, NONE, 0.2)])
    assert found.sides == [found.untouched] * 2
    assert numbers(found).count('<th scope="col">') == 1


@pytest.mark.parametrize("text", ["", "the red ring"])
def test_the_curve_is_that_of_single_runs(model: FakeModel, text: str) -> None:
    scene, number = SCENES[FIRST]
    asked = about_scene(scene, text or scene.queries[number].text)
    points, problems = curve(
        model, asked, [lambda budget: requested(FASTV, budget), lambda budget: requested(NONE, budget)]
    )
    assert {point.strategy for point in points} == {"none", "fastv"}
    assert [point.budget for point in points if point.strategy == "none"] == [*BUDGETS]
    fastv = {point.budget: point.value for point in points if point.strategy == "fastv"}
    assert [*fastv] == [0.3, 0.4, 0.5, 0.6, 0.8, 1.0]  # one of four layers has all tokens
    assert len(problems) == 1
    assert "'fastv' cannot meet budget 0.25 on 4 layers" in problems[0]
    words = asked.scene.queries[0].text
    reference = (
        asked.scene.queries[0].mask if asked.has_target else model.segment(scene.image, [words]).masks[0].numpy()
    )
    for budget, value in fastv.items():
        mask = model.segment(scene.image, [words], tp.strategy("fastv", budget=budget)).masks[0].numpy()
        assert value == pytest.approx(agreement([mask], [reference]))


# what is shown -------------------------------------------------------------------------------------------------------


def test_every_stage_has_its_picture(result: Result) -> None:
    shown = side(result.sides[0], result)
    trace = result.sides[0].outcome.trace
    for stage in trace.stages:
        assert f"from layer {stage.layer}: {int(stage.active.sum())} of 36" in shown
    assert shown.count("data:image/png;base64,") == shown.count("<figcaption>") > len(trace.stages)
    assert re.findall(r"<figcaption>([^<,]*)", picture(result)) == ["image", "target", "mask"]


def test_the_table_has_the_numbers(result: Result) -> None:
    table = numbers(result)
    for one in (result.untouched, *result.sides):
        for text in (f"{one.row.equivalent_tokens:.1f} ", f"{one.row.giou:.3f}", f"{one.row.prefill_ms:.1f}"):
            assert text in table
    assert "without pruning" in table
    assert "csp at 0.5" in table


def test_texts_are_escaped() -> None:
    assert message("<b>&") == '<p class="tp-problem" role="alert">&lt;b&gt;&amp;</p>'


def test_errors_of_users_are_one_line(session: Session, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("text")
    right = (FIRST, None, session.query_of(FIRST), "csp", 0.5, "", "fastv", 0.5, None)
    assert all("tp-problem" not in part for part in session.show(*right))
    wrong = [(None, None, *right[2:]), (FIRST, None, " ", *right[3:]), (None, str(tmp_path / "bad.png"), *right[2:])]
    for values in wrong:
        told, *others = session.show(*values)
        assert re.fullmatch(r'<p class="tp-problem" role="alert">[^<\n]+</p>', told)
        assert others == ["", "", ""]
        assert session.draw(*values) == (None, "", told)
    parts = session.show(*right[:5], "a=b", *right[6:])
    assert ["tp-problem" in part for part in parts] == [False, False, True, False]
    frame, name, problems = session.draw(*right[:3], "csp", 0.5, "a=b", "fastv", 0.5, "")
    assert name == "gIoU"
    assert set(frame.strategy) == {"none", "fastv"}
    assert "unknown option &#39;a&#39;" in problems


# the server ----------------------------------------------------------------------------------------------------------


def test_ports() -> None:
    with opened("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address(first) == f"http://127.0.0.1:{port}/"
        with pytest.raises(InputError, match=f"--port {port} cannot be used .*; choose another, or port 0"):
            opened("127.0.0.1", port)
    for wrong in (-1, 65536):
        with pytest.raises(InputError, match="expected a number from 0 to 65535"):
            opened("127.0.0.1", wrong)
    with pytest.raises(InputError, match="'no such host' is not an address"):
        opened("no such host", 0)


def test_an_address_of_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        listening = opened("::1", 0)
    except InputError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with listening:
        assert address(listening).startswith("http://[::1]:")


def test_the_application_tells_nobody(model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'tokenprune-vlm[demo]'")
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # restored at the end
    connected: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, place: connected.append(place))
    apps = [getattr(route, "app", None) for route in app_of(model, str(tmp_path)).routes]
    (page,) = [app.get_blocks() for app in apps if hasattr(app, "get_blocks")]
    assert page.analytics_enabled is False
    assert page.config["analytics_enabled"] is False
    assert page.config["footer_links"] == []
    assert all(event["api_visibility"] == "private" for event in page.config["dependencies"])
    assert page.theme._stylesheets == []  # of fonts on other hosts
    assert connected == []
