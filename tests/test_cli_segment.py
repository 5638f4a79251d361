"""`tokenprune segment` and `tokenprune inspect` through their entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_fixtures import Runner, assert_one_line, run
from PIL import Image

__all__ = ["run"]  # the fixture


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of 40 × 30 pixels."""
    path = tmp_path / "picture.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_segment_writes_the_mask_at_the_images_size(run: Runner, picture: Path, tmp_path: Path) -> None:
    out, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    strategy = ("--strategy", "front", "-o", "keep=0.25", "-o", "layer=2")
    ran = run("segment", picture, "the red thing", "--model", "fake", *strategy, "--out", out, "--overlay", overlay)
    assert ran.code == 0, ran.err
    with Image.open(out) as mask:
        assert (mask.size, mask.mode) == ((40, 30), "L")
        assert set(np.asarray(mask).ravel().tolist()) == {0, 255}
    with Image.open(overlay) as drawn:
        assert min(drawn.size) > 200
    assert str(out) in ran.out
    assert str(overlay) in ran.out
    assert "36 image tokens, 9 from layer 2; 22.5 equivalent tokens (62.5%)" in ran.out


def test_segment_without_a_strategy_runs_every_token(run: Runner, picture: Path, tmp_path: Path) -> None:
    ran = run("segment", picture, "the red thing", "--model", "fake", "--out", tmp_path / "m.png")
    assert "36 image tokens, all in every layer; 36.0 equivalent tokens (100.0%)" in ran.out


def test_budget_and_options_reach_the_strategy(run: Runner, picture: Path, tmp_path: Path) -> None:
    given = ("--strategy", "front", "-o", "layer=1", "--budget", 0.5)
    ran = run("segment", picture, "thing", "--model", "fake", *given, "--out", tmp_path / "m.png")
    assert "front at 0.5" in ran.out
    assert "(50.0%)" in ran.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("{tmp}/none.png", "thing"), ("none.png",)),
        (("{tmp}/text.png", "thing"), ("text.png",)),
        (("{tmp}", "thing"), ("{tmp}",)),
        (("{picture}", "  "), ("query is empty",)),
        (("{picture}", "thing", "--strategy", "frnt"), ("frnt", "did you mean 'front'")),
        (("{picture}", "thing", "-o", "kep=1"), ("kep", "did you mean 'keep'")),
        (("{picture}", "thing", "-o", "keep"), ("'keep'", "key=value")),
        (("{picture}", "thing", "-o", "keep=1", "-o", "keep=2"), ("keep", "twice")),
        (("{picture}", "thing", "--budget", "7"), ("budget 7", "(0, 1]")),
        (("{picture}", "thing", "--budget", "0.01"), ("cannot meet budget 0.01",)),
        (("{picture}", "thing", "--model", "fakee"), ("fakee", "did you mean 'fake'")),
        (("{picture}", "thing", "--out", "{tmp}/mask.jpg"), (".jpg", "expected .png")),
        (("{picture}", "thing", "--out", "{tmp}/no/mask.png"), ("no/mask.png", "folder")),
        (("{picture}", "thing", "--overlay", "{tmp}/no/o.png"), ("no/o.png", "folder")),
    ],
)
def test_bad_input_is_one_clear_line(
    run: Runner, picture: Path, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    filled = [part.format(tmp=tmp_path, picture=picture) for part in arguments]
    defaults = {"--model": "fake", "--strategy": "front", "--out": str(tmp_path / "m.png")}
    rest = [part for name, value in defaults.items() if name not in filled for part in (name, value)]
    ran = run("segment", *filled, *rest)
    assert_one_line(ran, *(part.format(tmp=tmp_path) for part in parts))
    assert not (tmp_path / "m.png").exists()


def test_inspect_draws_a_sample_of_a_data_set(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "sample.png"
    ran = run("inspect", "--model", "fake", "--dataset", "rectangles", "--index", 1, "--strategy", "tour", "--out", out)
    assert ran.code == 0, ran.err
    assert "the thing left of the star" in ran.out
    assert "18 from layer 0, 36 from layer 1, 2 from layer 2" in ran.out
    with Image.open(out) as drawn:
        assert min(drawn.size) > 200


def test_inspect_draws_an_own_image(run: Runner, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.png"
    ran = run("inspect", picture, "a thing", "--model", "fake", "--strategy", "fastv", "--out", out)
    assert ran.code == 0, ran.err
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("{picture}",), ("without a query",)),
        (("--index", "-1"), ("index", "at least 0")),
        (("--split", "trian"), ("trian", "did you mean 'train'")),
        (("--dataset", "shape"), ("did you mean 'shapes'",)),
        (("--out", "{tmp}"), ("expected .png",)),
    ],
)
def test_inspect_with_bad_input(
    run: Runner, picture: Path, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    filled = [part.format(tmp=tmp_path, picture=picture) for part in arguments]
    defaults = {"--model": "fake", "--strategy": "front", "--out": str(tmp_path / "m.png")}
    rest = [part for name, value in defaults.items() if name not in filled for part in (name, value)]
    assert_one_line(run("inspect", *filled, *rest), *parts)


def test_the_installed_command_exits_with_2_and_one_line(picture: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenprune", "segment", str(picture), "thing", "--strategy", "fastvv"]
    command += ["--out", str(tmp_path / "m.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean 'fastv'" in done.stderr
