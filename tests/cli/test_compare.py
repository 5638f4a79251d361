"""`tokenprune compare` through its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_fixtures import Runner, assert_one_line, run
from fake_segmentation import FakeData
from PIL import Image

from tokenprune import hookimpl
from tokenprune.cli.commands.compare import STRATEGIES
from tokenprune.plugins import registry
from tokenprune.plugins.hookspecs import Register

__all__ = ["run"]  # the fixture

FAKE = ("--model", "fake", "--dataset", "rectangles", "--limit", 4, "--timing-samples", 1)


def test_json_is_one_object_and_nothing_else_on_stdout(run: Runner) -> None:
    ran = run("compare", *FAKE, "--strategies", "none,blind,front:layer=2,keep=0.5,budget=none", "--format", "json")
    found = json.loads(ran.out)
    assert ran.code == 0
    assert list(found) == ["model", "dataset", "split", "samples", "budget", "environment", "rows"]
    assert (found["model"], found["samples"], found["budget"]) == ("fake", 4, 0.35)
    assert [row["strategy"] for row in found["rows"]] == ["none", "blind", "front"]
    assert found["rows"][2]["options"] == {"keep": 0.5, "layer": 2, "note": None}


def test_table_on_stdout_progress_on_stderr(run: Runner) -> None:
    ran = run("compare", *FAKE, "--strategies", "none,front")
    assert ran.code == 0
    for text in ("gIoU", "cIoU", "agree", "tokens", "FLOPs", "KV", "prefill", "speed-up", "none", "front"):
        assert text in ran.out
    assert "accuracy" in ran.err
    assert "accuracy" not in ran.out


def test_samples_that_are_fewer_than_asked_for_are_told(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    few = FakeData.scenes
    monkeypatch.setattr(FakeData, "scenes", lambda self, split, limit=None, seed=0: few(self, split, 4, seed))
    words = ("compare", "--model", "fake", "--dataset", "rectangles", "--strategies", "none")
    ran = run(*words, "--limit", 200, "--timing-samples", 20)
    assert ran.code == 0
    assert "accuracy" in ran.err
    assert "4/200" not in ran.err.splitlines()[0]
    assert "4/4" in ran.err
    assert "prefill was timed on 2 queries instead of 20: on one of each image" in ran.err
    assert "prefill was timed" not in run(*words, "--limit", 200).err  # nobody asked for 8


def test_metrics_of_plugins_are_chosen_by_name(run: Runner) -> None:
    class Metrics:
        @hookimpl
        def tokenprune_register_metrics(self, register: Register) -> None:
            for name in ("area", "height"):
                register(name, lambda measured: measured.mask.mean(), summary="of a test")

    registry.register_plugin(Metrics(), "metrics")
    try:
        for asked, given in ((), ["area", "height"]), (("--metrics", "height"), ["height"]), (("--metrics", ""), []):
            ran = run("compare", *FAKE, "--strategies", "none", "--format", "json", *asked)
            assert list(json.loads(ran.out)["rows"][0]["metrics"]) == given
        assert_one_line(run("compare", *FAKE, "--metrics", "aera"), "unknown metric 'aera'; did you mean 'area'")
    finally:
        registry.unregister_plugin("metrics")


def test_out_holds_results_plots_and_overlays(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    ran = run("compare", *FAKE, "--strategies", "none,front", "--budget", "0.5,0.25", "--out", out, "--overlays", 1)
    assert ran.code == 0, ran.err
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "overlay-0-red-thing-budget-0.25.png",
        "overlay-0-red-thing-budget-0.5.png",
        "results.json",
        "tradeoff-agreement.png",
        "tradeoff-giou.png",
    ]
    assert json.loads((out / "results.json").read_text())["budget"] == [0.5, 0.25]
    for name in names:
        if name.endswith(".png"):
            with Image.open(out / name) as picture:
                assert min(picture.size) > 200
                assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_defaults_are_the_documented_ones() -> None:
    assert STRATEGIES == "none,blind,random,uniform,csp,fastv,prumerge+"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--strategies", "fastvv"), ("fastvv", "did you mean 'fastv'")),
        (("--strategies", "front:kep=1"), ("front", "kep", "did you mean 'keep'")),
        (("--strategies", "front:layer=x"), ("front", "layer", "'x'")),
        (("--strategies", "none,,blind"), ("empty name",)),
        (("--dataset", "rectangle"), ("rectangle", "did you mean 'rectangles'")),
        (("--split", "vall"), ("vall", "did you mean 'val'")),
        (("--model", "lisa-tny"), ("lisa-tny", "did you mean 'lisa-tiny'")),
        (("--model", "/no/such/folder"), ("/no/such/folder",)),
        (("--budget", "1.5"), ("1.5", "(0, 1]")),
        (("--budget", "0"), ("budget", "(0, 1]")),
        (("--budget", "half"), ("half", "(0, 1]")),
        (("--budget", "0.01", "--strategies", "fastv"), ("fastv", "cannot meet budget 0.01")),
        (("--limit", "0"), ("limit", "at least 1")),
        (("--seed", "-1"), ("seed", "at least 0")),
        (("--out", "/proc/none/here"), ("/proc/none/here", "cannot be written")),
        (("--strategies", "prumerge"), ("prumerge", "fake")),
    ],
)
def test_bad_input_is_one_clear_line(run: Runner, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    given = {**dict(zip(FAKE[::2], FAKE[1::2], strict=True)), "--strategies": "none"}
    given.update(zip(arguments[::2], arguments[1::2], strict=True))
    flat = [part for pair in given.items() for part in pair]
    assert_one_line(run("compare", *flat), *(part for part in parts if part != "fake"))


def test_out_that_is_a_file(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    assert_one_line(run("compare", *FAKE, "--out", file), "taken", "cannot be written")


def test_debug_shows_the_traceback(run: Runner) -> None:
    ran = run("compare", *FAKE, "--limit", 0, "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.strip().splitlines()[-1].startswith("error: limit")


def test_the_installed_command_exits_with_2_and_one_line() -> None:
    command = [sys.executable, "-m", "tokenprune", "compare", "--strategies", "unifrom"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean 'uniform'" in done.stderr
