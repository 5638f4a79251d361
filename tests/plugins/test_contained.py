"""Plugin modules, datasets, models, metrics, report sections and observers that misbehave: named, and contained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import FakeData, FakeModel
from plugin_packages import install, registering, searched

import tokenprune as tp
from tokenprune import compare
from tokenprune.datasets.base import Scene
from tokenprune.errors import InputError, PluginError, PluginWarning
from tokenprune.plugins import registry
from tokenprune.report.write import write_comparison
from tokenprune.testing.tiny_decoders import tiny_llama

HOOK = "from tokenprune import hookimpl\n\n\n"
WRAPPER = "@hookimpl(wrapper=True)\ndef tokenprune_register_strategies(register):\n    return (yield)\n"
ASYNC = "@hookimpl\nasync def tokenprune_run_started(run):\n    pass\n"
CLASS = "class Plug:\n    @hookimpl\n    def tokenprune_register_strategies(self, register):\n        pass\n"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    registry.reset()
    yield
    registry.reset()


def plug(kind: str, target: Any) -> None:
    """Register "odd" in a plugin "mine"."""
    hook = tp.hookimpl(lambda self, register: register("odd", target))
    registry.register_plugin(type("Mine", (), {f"tokenprune_register_{kind}": hook})(), "mine")


# modules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "point", "message"),
    [
        (
            "import pytest\npytest.skip('not here', allow_module_level=True)\n",
            "",
            "it cannot be loaded: Skipped: not h",
        ),
        ("class E(Exception):\n    def __str__(self): raise KeyError\nraise E\n", "", "it cannot be loaded: E"),
        ("def f(): f()\nf()\n", "", "it cannot be loaded: RecursionError"),
        (registering("x").replace("'found'", "5"), "", "found 5 as the summary of the strategy 'x', expected a line"),
        (registering("x").replace("    reg", "    1/0\n    reg"), "", "its hook tokenprune_register_strategies failed"),
        (HOOK + WRAPPER, "", "register_strategies is a generator or a hook wrapper (it has a yield)"),
        (HOOK + ASYNC, "", "its hook tokenprune_run_started is a coroutine (async def)"),
        (HOOK + CLASS, "bad_pack:Plug", "it is the class Plug, expected a module or an object"),
        ("", "bad pack!", 'its entry point is \'bad pack!\', expected "module" or "module:attribute"'),
        (
            registering("x").replace("    reg", "    from tokenprune.plugins import registry as r; r.reset()\n    reg"),
            "",
            "registry.reset() was called while plugins are being loaded",
        ),
    ],
)
def test_a_module_that_cannot_be_a_plugin(source: str, point: str, message: str, tmp_path: Path) -> None:
    install(tmp_path, "bad-pack", source)
    install(tmp_path, "good-pack", registering("good", target="tokenprune_strategies.baselines:Uniform"))
    if point:
        (tmp_path / "bad_pack-1.2.dist-info" / "entry_points.txt").write_text(f"[tokenprune]\nplug = {point}\n")
    with searched(tmp_path):
        (broken,) = registry.broken_plugins()
        assert broken.error.startswith("plugin 'plug' of package 'bad-pack': ")
        assert message in broken.error
        assert tp.strategy("good")


def test_two_entry_points_of_one_name_leave_the_first(tmp_path: Path) -> None:
    install(tmp_path, "bad-pack", registering("first"))
    (tmp_path / "second.py").write_text(registering("second"))
    points = "[tokenprune]\nplug = bad_pack\nplug = second\n"
    (tmp_path / "bad_pack-1.2.dist-info" / "entry_points.txt").write_text(points)
    with searched(tmp_path):
        assert "first" in tp.strategies()
        (broken,) = registry.broken_plugins()
        assert "has two entry points of this name; the first is used" in broken.error


def test_what_a_plugin_prints_does_not_come_into_a_listing(tmp_path: Path) -> None:
    install(tmp_path, "loud-pack", "print('hello')\n" + registering("loud").replace("    reg", "    print(1)\n    reg"))
    command = [sys.executable, "-m", "tokenprune", "list", "--format", "json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "loud" in [entry["name"] for entry in json.loads(found.stdout)["strategies"]]
    assert "hello" in found.stderr


# datasets and models ------------------------------------------------------------------------------------------------

SCENE = next(iter(FakeData().scenes("val", 2, 0)))
QUERY = SCENE.queries[0]


def breaking_off() -> Iterator[Scene]:
    yield SCENE
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        (breaking_off, r"failed in scenes\(\) with OSError: disk gone"),
        (lambda: None, r"failed in scenes\(\) with TypeError"),
        (lambda: [("a", "b")], "after 0 queries, tuple, expected a Scene"),
        (
            lambda: [replace(SCENE, queries=[replace(QUERY, kind="blue")])],
            r"scene 'val-2', 'red thing' of kind 'blue', expected one of its kinds, short, long",
        ),
        (lambda: [replace(SCENE, queries=[])], r"queries \[\], expected a list of at least one Query"),
        (
            lambda: [replace(SCENE, image=SCENE.image / 255)],
            r"image that is float64 \[.*\], expected uint8 \[H, W, 3\]",
        ),
        (lambda: [replace(SCENE, queries=[replace(QUERY, mask=QUERY.mask[:3])])], "expected bool .*, the image's size"),
        (lambda: [replace(SCENE, queries=[replace(QUERY, mask=QUERY.mask / 2)])], "has the values 0.5, expected"),
        (lambda: [replace(SCENE, queries=[replace(QUERY, text="a \udcff")])], r"whose text 'a .udcff' holds .udcff"),
        (lambda: [replace(SCENE, queries=[replace(QUERY, text=" ")])], "a query whose text is ' '"),
    ],
)
def test_a_data_set_that_misbehaves_is_named(scenes: Callable[[], Any], message: str) -> None:
    plug("datasets", type("Odd", (FakeData,), {"name": "odd", "scenes": lambda self, *_: scenes()}))
    with pytest.raises(PluginError, match=f"'mine': dataset 'odd' .*{message}"):
        compare(FakeModel(), "odd", ["none"], limit=6, timing_samples=0)


def test_more_queries_than_the_limit_are_cut_with_a_warning() -> None:
    def heedless(self: FakeData, split: str, limit: int | None, seed: int) -> Iterator[Scene]:
        return FakeData.scenes(self, split, None, seed)

    plug("datasets", type("Odd", (FakeData,), {"name": "odd", "scenes": heedless}))
    for limit in (3, 4):
        with pytest.warns(PluginWarning, match=rf"'mine': data ?set 'odd' gave more queries than limit = {limit}"):
            found = compare(FakeModel(), "odd", ["none"], limit=limit, timing_samples=0)
        expected = compare(FakeModel(), FakeData(), ["none"], limit=limit, timing_samples=0)
        assert found.samples == limit
        assert found.rows == expected.rows


@pytest.mark.parametrize("dtype", [float, np.float32, np.uint8, np.int64])
def test_targets_of_numbers_are_those_of_bool(dtype: Any) -> None:
    def found(kind: Any) -> Any:
        def scenes(self: Any, *asked: Any) -> Iterator[Scene]:
            for scene in FakeData.scenes(self, *asked):
                yield replace(scene, queries=[replace(q, mask=q.mask.astype(kind)) for q in scene.queries])

        data = type("Numbers", (FakeData,), {"name": "numbers", "scenes": scenes})()
        return compare(FakeModel(), data, ["none", "random"], limit=6, timing_samples=0).rows

    assert [row.giou for row in found(dtype)] == [row.giou for row in found(bool)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"scenes": lambda self, split: iter(())},
            r"has scenes\(split\), expected scenes\(split, limit=None, seed",
        ),
        ({"kinds": "short"}, r"has kinds 'short', expected a tuple of the kinds of its queries"),
        ({"__init__": lambda _: 1 / 0}, "failed with ZeroDivisionError"),
        ({"splits": "val"}, "has splits 'val', expected"),
    ],
)
def test_a_data_set_that_cannot_be_made_is_named(parts: dict[str, Any], message: str) -> None:
    plug("datasets", type("Odd", (FakeData,), {"name": "odd", **parts}))
    with pytest.raises(PluginError, match=f"dataset 'odd' {message}"):
        compare(FakeModel(), "odd", ["none"], limit=6, timing_samples=0)


@pytest.mark.parametrize("folder", ["/surely/not/there", None])
def test_a_model_without_a_folder_is_named(folder: str | None) -> None:
    plug("models", lambda: folder)
    with pytest.raises(PluginError, match=r"'mine': model 'odd' gave .*, expected its checkpoint's folder; reinstall"):
        tp.load("odd")


# metrics and report sections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda measured: measured.mask.fill(True), "failed with ValueError: .*read-only"),
        (lambda measured: measured.target.fill(True), "failed with ValueError: .*read-only"),
        (lambda measured: measured.query.mask.fill(True), "failed with ValueError: .*read-only"),
        (lambda measured: torch.zeros(2), "expected a finite number or None"),
        (lambda measured: sys.exit(1), "failed with SystemExit: 1"),
    ],
)
def test_a_metric_that_misbehaves_changes_nothing(metric: Callable[[Any], Any], message: str) -> None:
    before = np.array(QUERY.mask)
    plug("metrics", metric)
    with pytest.raises(PluginError, match=f"'mine': metric 'odd' .*{message}"):
        compare(FakeModel(), FakeData(), ["none"], limit=2, timing_samples=0)
    assert np.array_equal(before, QUERY.mask)


def _outside(comparison: object, folder: Path) -> list[Path]:
    path = Path(tempfile.mkdtemp()) / "elsewhere.txt"
    path.write_text("x")
    return [path]


@pytest.mark.parametrize("section", [_outside, lambda *_: [3], lambda *_: "a", lambda _, folder: [folder]])
def test_a_report_section_tells_of_files_in_the_folder(section: Callable[..., Any], tmp_path: Path) -> None:
    found = compare(FakeModel(), FakeData(), ["none", "fastv"], limit=2, timing_samples=0)
    plug("report_sections", section)
    with pytest.raises(PluginError, match=r"'mine': report section 'odd' gave .*, expected a list of the files"):
        write_comparison(found, tmp_path)
    assert (tmp_path / "results.json").is_file()


# observers -----------------------------------------------------------------------------------------------------------

MODEL = tiny_llama(4)
IDS = torch.arange(24).reshape(2, 12)


def run(body: Callable[[], Any] = lambda: None) -> list[list[int]]:
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[:, 2:8] = True
    with torch.no_grad(), tp.prune(MODEL, tp.strategy("fastv"), image_tokens=image, strict=True) as found:
        body()
        MODEL(IDS)
    return found.trace.stages[0].kept


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda run, decision: run.prefill.state.active.fill_(True), "a write to run.prefill.state.active"),
        (lambda run, decision: decision.index.zero_(), "a write to decision.index"),
        (lambda run, decision: setattr(run.prefill, "state", None), "a write to run.prefill.state"),
        (lambda run, decision: run.trace.stages.clear(), "a write to run.trace.stages"),
        (
            lambda run, decision: MODEL(IDS),
            "PluginError: the model was called from a strategy, an observer or an adapter",
        ),
        (lambda run, decision: sys.exit(1), "SystemExit: 1"),
        (lambda run, decision: (_ for _ in ()).throw(InputError("mine")), "InputError: mine"),
    ],
)
def test_an_observer_that_meddles_is_named(act: Callable[..., Any], message: str) -> None:
    expected = run()

    class Meddling:
        @tp.hookimpl
        def tokenprune_decision_taken(self, run, decision):
            act(run, decision)

    registry.register_plugin(Meddling(), "mine")
    with pytest.raises(PluginError, match=f"'mine': its hook tokenprune_decision_taken failed with {message}"):
        run()
    registry.unregister_plugin("mine")
    assert run() == expected


def test_an_observer_that_fails_at_the_end_does_not_hide_the_callers_error() -> None:
    class Failing:
        @tp.hookimpl
        def tokenprune_run_finished(self, run):
            raise KeyError("log")

    registry.register_plugin(Failing(), "mine")
    with (
        pytest.warns(PluginWarning, match="'mine': its hook tokenprune_run_finished"),
        pytest.raises(ZeroDivisionError),
    ):
        run(lambda: 1 / 0)
    with pytest.raises(PluginError, match="'mine': its hook tokenprune_run_finished failed with KeyError"):
        run()
