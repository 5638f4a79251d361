"""`tokenprune segment` and `tokenprune inspect` through their entry point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_fixtures import Runner, assert_one_line, run
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from PIL import Image
from pixellm_checkpoints import write_pixellm
from sa2va_checkpoints import write_sa2va

import tokenprune as tp
from tokenprune.cli.images import words
from tokenprune.utils import stopwatch

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
        (("{tmp}/empty", "thing", "--out", "{tmp}/masks"), ("{tmp}/empty", "holds no image")),
        (("{tmp}/*.jpg", "thing", "--out", "{tmp}/masks"), ("{tmp}/*.jpg", "matches no file")),
        (("{tmp}", "thing"), ("m.png", "name a folder")),
        (("{picture}", "{tmp}/text.png"), ("query", "{tmp}/text.png", "after the images")),
        (("~nobody-at-all/a.png", "thing"), ("~nobody-at-all/a.png", "no such file")),
        (("{picture}", "{picture}", "thing"), ("m.png", "name a folder")),
        (("{picture}", "thing", "--out", "{picture}"), ("--out '{picture}'", "same file as the image that is read")),
        (("{tmp}", "thing", "--out", "{tmp}"), ("--out '{picture}'", "same file as the image that is read")),
        (("{tmp}", "thing", "--out", "{tmp}/a", "--overlay", "{tmp}/a"), ("--overlay '{tmp}/a/", "same file as --out")),
        (("{picture}", "  "), ("query is empty",)),
        (("{picture}", "thing", "--strategy", "frnt"), ("frnt", "did you mean 'front'")),
        (("{picture}", "thing", "-o", "kep=1"), ("kep", "did you mean 'keep'")),
        (("{picture}", "thing", "-o", "keep"), ("'keep'", "key=value")),
        (("{picture}", "thing", "-o", "keep=1", "-o", "keep=2"), ("keep", "twice")),
        (("{picture}", "thing", "--budget", "7"), ("budget must be", "(0, 1], got 7")),
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
    (tmp_path / "empty").mkdir()
    filled = [part.format(tmp=tmp_path, picture=picture) for part in arguments]
    defaults = {"--model": "fake", "--strategy": "front", "--out": str(tmp_path / "m.png")}
    rest = [part for name, value in defaults.items() if name not in filled for part in (name, value)]
    before = sorted(tmp_path.rglob("*"))
    ran = run("segment", *filled, *rest)
    assert_one_line(ran, *(part.format(tmp=tmp_path, picture=picture) for part in parts))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def album(tmp_path: Path) -> dict[str, Path]:
    """Four pictures of different sizes in two folders, two of them called the same; and what is no picture."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "album"
    found = {}
    for number, name in enumerate(("one.png", "two.jpg", "one.jpg", "other/two.jpg")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)).save(path)
        found[name] = path
    (folder / "notes.txt").write_text("no picture")
    return found


def alone(run: Runner, image: Path, out: Path) -> np.ndarray:
    """The mask of one image by itself."""
    assert run("segment", image, "the red thing", "--model", "fake", "--strategy", "front", "--out", out).code == 0
    return np.asarray(Image.open(out))


MANY = ("the red thing", "--model", "fake", "--strategy", "front")


def test_a_folder_is_segmented_image_by_image(run: Runner, album: dict[str, Path], tmp_path: Path) -> None:
    ran = run("segment", tmp_path / "album", *MANY, "--out", tmp_path / "masks", "--overlay", tmp_path / "sheets")
    assert (ran.code, ran.err) == (0, "")
    names = {"one.png": "one.png.png", "two.jpg": "two.png", "one.jpg": "one.jpg.png"}  # of the folder, not below it
    assert {path.name for path in (tmp_path / "masks").iterdir()} == set(names.values())
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == set(names.values())
    for name, mask in names.items():
        expected = alone(run, album[name], tmp_path / "alone.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / mask)), expected)


def test_files_folders_and_patterns_together(run: Runner, album: dict[str, Path], tmp_path: Path) -> None:
    given = (album["one.png"], tmp_path / "album" / "**" / "two.*", tmp_path / "album" / "other")
    ran = run("segment", *given, *MANY, "--out", tmp_path / "masks")
    assert (ran.code, ran.err) == (0, "")
    masks = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "masks").iterdir()}
    heights = {name: len(mask) for name, mask in masks.items()}
    assert heights == {"one.png": 30, "two.jpg.png": 33, "two.jpg-2.png": 31}  # patterns are sorted: other/ comes first


def test_an_image_whose_name_looks_like_a_pattern(run: Runner, album: dict[str, Path], tmp_path: Path) -> None:
    path = album["one.png"].rename(tmp_path / "one[1].png")
    assert alone(run, path, tmp_path / "m.png").shape == (30, 40)


def test_a_bad_image_is_told_and_the_others_are_done(run: Runner, album: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "album" / "bad.png").write_text("no picture")
    ran = run("segment", tmp_path / "album", *MANY, "--out", tmp_path / "masks")
    assert ran.code == 1
    first, last = ran.err.strip().splitlines()
    assert first.startswith("error: image ")
    assert "bad.png" in first
    assert last == f"error: 1 of 4 images could not be segmented: {tmp_path / 'album' / 'bad.png'}"
    assert len(list((tmp_path / "masks").iterdir())) == 3
    assert ran.out.count("wrote ") == 3


def test_what_is_wrong_for_every_image_is_told_once(run: Runner, album: dict[str, Path], tmp_path: Path) -> None:
    words = ("--model", "fake", "--strategy", "csp", "-o", "clustering=cls_attention")
    ran = run("segment", tmp_path / "album", "thing", *words, "--out", tmp_path / "masks")
    assert_one_line(ran, "csp", "ClsAttention")


def test_the_time_of_each_stage_is_told(run: Runner, picture: Path, tmp_path: Path) -> None:
    words = ("segment", picture, "thing", "--out", tmp_path / "m.png", "--model")
    stages = ("pruning context", "preprocess", "vision tower", "mask encoder", "prefill", "mask decoder")
    told = ", ".join(rf"{stage} ([\d.]+) m?s" for stage in stages) + r"; ([\d.]+) m?s in all"
    found = re.search(rf"^time: {told}$", run(*words, "lisa-tiny").out, re.MULTILINE)
    assert found is not None
    *parts, total = map(float, found.groups())
    assert sum(parts) <= total + 0.05 * len(parts)  # as rounded
    plain = run(*words, "fake").out  # which tells of no stages
    assert re.search(r"^time: [\d.]+ m?s in all$", plain, re.MULTILINE)


def test_times_are_told_in_seconds_from_one_on() -> None:
    assert stopwatch.summary({"prefill": 250.0, "total": 999.9}) == "time: prefill 250.0 ms; 999.9 ms in all"
    assert stopwatch.summary({"prefill": 250.0, "total": 1000.0}) == "time: prefill 0.25 s; 1.00 s in all"
    assert stopwatch.rate({"prefill": 1.0, "total": 500.0}, 4) == "0.5 s, 8.00 images/s"


@pytest.mark.parametrize("write", [write_lisa, write_glamm, write_pixellm, write_sa2va])
def test_every_family_tells_its_stages(write: Callable[[Path], Path], picture: Path, tmp_path: Path) -> None:
    model = tp.load(write(tmp_path / "model"))
    with stopwatch.recorded() as times:
        model.segment(picture, "the red thing")
    assert list(times) == ["preprocess", "vision tower", "mask encoder", "prefill", "mask decoder", "total"]
    encoded = model.encode_image(picture)
    with stopwatch.recorded() as times:
        model.segment(encoded, "the red thing", answer="generate", max_new_tokens=2)
    assert {*times} <= {"generation", "mask decoder", "total"}  # the image was encoded before


def test_devices_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was started counts in the stage that started it."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with stopwatch.stage("early"):
        pass
    assert waited == []  # nobody asks
    with stopwatch.recorded(), stopwatch.stage("prefill"):
        assert waited == [0, 1] * 2
    assert waited == [0, 1] * 4


def test_stages_are_measured_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) ** 2)
    with stopwatch.stage("early"):  # nobody asks: no look at the clock
        pass
    with stopwatch.recorded() as times:  # from 0
        with stopwatch.stage("first"):  # from 1 to 4
            pass
        with stopwatch.stage("second"):  # from 9 to 16
            pass
        with pytest.raises(ValueError, match="away"), stopwatch.stage("failed"):  # from 25
            raise ValueError("away")
        with stopwatch.stage("first"):  # from 36 to 49
            pass
    assert times == {"first": 16_000, "second": 7_000, "total": 64_000}
    with stopwatch.recorded() as around:  # from 81
        with stopwatch.stage("first"):  # from 100 to 121
            pass
        with stopwatch.recorded() as within, stopwatch.stage("first"):  # from 144; from 169 to 196
            pass  # to 225
    assert within == {"first": 27_000, "total": 81_000}
    assert around == {"first": 48_000, "total": 175_000}
    with stopwatch.stage("late"):
        pass
    assert "late" not in times


def test_a_remembered_image_is_told(picture: Path) -> None:
    model = tp.load("lisa-tiny")
    with stopwatch.recorded() as first:
        model.segment(picture, "the red thing")
    with stopwatch.recorded() as second:
        model.segment(picture, "the blue thing")
    assert {"vision tower", "mask encoder"} <= {*first}
    assert list(second) == ["preprocess", "remembered image", "prefill", "mask decoder", "total"]


# answers and sizes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generated answers have any number of masks."""
    return write_lisa(tmp_path_factory.mktemp("model") / "lisa")


@pytest.mark.parametrize("model", ["lisa-tiny", "random"])
@pytest.mark.parametrize("draft", [(), ("--no-draft",)])
def test_a_generated_answer_is_printed_and_its_masks_are_one(
    run: Runner, picture: Path, tmp_path: Path, checkpoint: Path, model: str, draft: tuple[str, ...]
) -> None:
    source = checkpoint if model == "random" else model
    words = ("--model", source, "--answer", "generate", "--max-new-tokens", 9, *draft)
    ran = run("segment", picture, "the red ring", *words, "--out", tmp_path / "m.png")
    assert ran.code == 0, ran.err
    found = tp.load(source).segment(picture, "the red ring", answer="generate", max_new_tokens=9)
    said = " ".join(found.text.split())
    many = {0: " without a mask", 1: ""}.get(len(found.masks), f", {len(found.masks)} masks in one")
    assert f"\nanswer{many}: {said}\n" in ran.out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "m.png")) == 255, found.masks.any(0).numpy())


@pytest.mark.parametrize(("size", "shape"), [("20x10", (10, 20)), ("7×50", (50, 7)), ("low", None)])
def test_the_size_of_a_mask(
    run: Runner, picture: Path, tmp_path: Path, checkpoint: Path, size: str, shape: tuple[int, int] | None
) -> None:
    words = ("--model", checkpoint, "--mask-size", size)
    assert run("segment", picture, "the cat", *words, "--out", tmp_path / "m.png").code == 0
    wanted = tp.load(checkpoint).segment(picture, "the cat", mask_size=shape or "low").masks[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "m.png")) == 255, wanted.numpy())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--max-new-tokens", "9"), ("--max-new-tokens has no effect", "--answer generate")),
        (("--no-draft",), ("--no-draft has no effect", "--answer generate")),
        (("--answer", "generate", "--max-new-tokens", "0"), ("--max-new-tokens: 0", "at least 1")),
        (("--answer", "free"), ("--answer", "forced", "generate")),
        (("--answer", "generate"), ("model 'fake'", "takes no answer=")),
        (("--mask-size", "20x10"), ("model 'fake'", "takes no mask_size=")),
        (("--mask-size", "20"), ("--mask-size: '20' found, expected WIDTHxHEIGHT",)),
        (("--mask-size", "0x20"), ("--mask-size: '0x20' found",)),
        (("--mask-size", "20x10", "--overlay", "{tmp}/o.png"), ("--mask-size has no effect on --overlay",)),
    ],
)
def test_answers_and_sizes_that_are_refused(
    run: Runner, picture: Path, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    given = [part.format(tmp=tmp_path) for part in arguments]
    out = tmp_path / "m.png"
    assert_one_line(run("segment", picture, "thing", "--model", "fake", *given, "--out", out), *parts)
    assert not out.exists()


# inspect --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("query", ["the rød ring", "r\udcc3\udcb8d"])
def test_words_that_a_locale_of_ascii_hands_over_as_bytes(query: str) -> None:
    assert words(query, "query", [Path("a.png")]) == {"r\udcc3\udcb8d": "rød"}.get(query, query)
