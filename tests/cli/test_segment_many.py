"""`tokenprune segment` on many images through its entry point: batches, tables, JSON lines, and what fails."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import Runner, assert_one_line, run
from lisa_checkpoints import write_lisa
from PIL import Image

import tokenprune as tp
from tokenprune.cli import progress

__all__ = ["run"]  # the fixture
FAKE = ("--model", "fake", "--strategy", "front")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes many images at once."""
    return write_lisa(tmp_path_factory.mktemp("model") / "lisa")


def write_picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30 + seed % 7, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of five pictures."""
    for number in range(5):
        write_picture(tmp_path / "album" / f"photo{number}.png", number)
    return tmp_path / "album"


def masks_in(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}


@pytest.mark.parametrize("batch", [(), ("--batch-size", 2)])
def test_masks_are_those_of_each_image_alone(run: Runner, checkpoint: Path, album: Path, batch: tuple[Any]) -> None:
    strategy = ("--strategy", "csp", "--budget", 0.6)
    out = album.parent / "masks"
    ran = run("segment", album, "the cat", "--model", checkpoint, *strategy, *batch, "--out", out)
    assert (ran.code, ran.err) == (0, "")
    model, csp = tp.load(checkpoint), tp.strategy("csp", budget=0.6)
    found = masks_in(out)
    assert sorted(found) == [f"photo{number}.png" for number in range(5)]
    for name, mask in found.items():
        assert np.array_equal(mask == 255, model.segment(album / name, "the cat", csp).masks[0].numpy())
    *lines, times, summary = ran.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"wrote {out / name}" for name in sorted(found)]
    told = re.findall(r"([a-z ]+) [\d.]+ m?s", times.removeprefix("time: "))
    stages = {"preprocess", "vision tower", "mask encoder", "prefill", "mask decoder", "writing"}
    assert stages <= {name.strip() for name in told}
    assert re.fullmatch(r"5 of 5 images segmented in [\d.]+ s, [\d.]+ images/s", summary)
    assert all("equivalent tokens" in line for line in lines)


def test_what_is_broken_is_counted_and_named(run: Runner, checkpoint: Path, album: Path) -> None:
    for number in range(12):
        (album / f"broken{number:02}.png").write_text("no picture")
    out = album.parent / "masks"
    ran = run("segment", album, "the cat", "--model", checkpoint, "--out", out)
    assert ran.code == 1
    assert len(masks_in(out)) == 5
    *each, last = ran.err.splitlines()
    assert len(each) == 12
    assert all(line.startswith("error: image ") for line in each)
    assert last.startswith("error: 12 of 17 images could not be segmented: ")
    assert last.endswith(" and 2 more")
    assert sum(f"broken{number:02}.png" in last for number in range(12)) == 10
    assert "5 of 17 images segmented" in ran.out


def test_json_lines(run: Runner, checkpoint: Path, album: Path) -> None:
    (album / "broken.png").write_text("no picture")
    out = album.parent / "masks"
    ran = run("segment", album, "the cat", "--model", checkpoint, "--format", "json", "--out", out)
    assert ran.code == 1
    first, *others = map(json.loads, ran.out.splitlines())
    assert list(first) == ["image", "query", "error"]
    assert first["image"] == str(album / "broken.png")
    assert len(others) == 5
    for found in others:
        mask = np.asarray(Image.open(found["mask"]))
        assert mask.shape == (found["height"], found["width"])
        assert found["covers"] == pytest.approx((mask == 255).mean(), abs=1e-6)
        assert (found["query"], found["strategy"]) == ("the cat", "none")
        assert found["equivalent_tokens"] == found["image_tokens"] > 0
    assert "5 of 6 images segmented" in ran.err


def test_json_of_one_image(run: Runner, album: Path, tmp_path: Path) -> None:
    ran = run("segment", album / "photo0.png", "the cat", *FAKE, "--format", "json", "--out", tmp_path / "m.png")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["mask"] == str(tmp_path / "m.png")
    assert found["milliseconds"]["total"] > 0


def test_generated_answers_are_those_of_each_image_alone(run: Runner, checkpoint: Path, album: Path) -> None:
    out = album.parent / "masks"
    words = ("--answer", "generate", "--max-new-tokens", 12, "--strategy", "fastv", "--budget", 0.6)
    ran = run("segment", album, "the cat", "--model", checkpoint, *words, "--format", "json", "--out", out)
    assert ran.code == 0, ran.err
    model, fastv = tp.load(checkpoint), tp.strategy("fastv", budget=0.6)
    for line in map(json.loads, ran.out.splitlines()):
        alone = model.segment(line["image"], "the cat", fastv, answer="generate", max_new_tokens=12)
        assert (line["text"], line["masks"]) == (alone.text, len(alone.masks))
        assert line["equivalent_tokens"] == pytest.approx(alone.trace.ledger.equivalent_tokens, abs=1e-3)
        assert np.array_equal(np.asarray(Image.open(line["mask"])) == 255, alone.masks.any(0).numpy())


def test_masks_are_replaced_only_if_told(run: Runner, album: Path, tmp_path: Path) -> None:
    words = ("segment", album, "the cat", *FAKE, "--out", tmp_path / "masks")
    assert run(*words).code == 0
    (tmp_path / "masks" / "photo1.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").iterdir()}
    assert_one_line(run(*words), "--out", "photo0.png", "and 3 more exist already", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").iterdir()} == before
    ran = run(*words, "--overwrite")
    assert (ran.code, ran.err) == (0, "")
    assert len(masks_in(tmp_path / "masks")) == 5


def test_overlays_are_drawn_one_by_one(run: Runner, album: Path, tmp_path: Path) -> None:
    places = ("--out", tmp_path / "masks", "--overlay", tmp_path / "sheets")
    ran = run("segment", album, "the cat", *FAKE, *places)
    assert (ran.code, ran.err) == (0, "")
    assert sorted(masks_in(tmp_path / "sheets")) == sorted(masks_in(tmp_path / "masks"))
    assert f"wrote {tmp_path / 'masks' / 'photo0.png'} and {tmp_path / 'sheets' / 'photo0.png'}: 40×30" in ran.out


# tables ---------------------------------------------------------------------------------------------------------------


def test_a_table_has_a_query_for_each_image(run: Runner, checkpoint: Path, album: Path) -> None:
    table = album / "queries.csv"
    table.write_text('image,query\nphoto0.png,the cat\nphoto1.png,"left, behind"\nphoto0.png,a dog\n', encoding="utf-8")
    out = album.parent / "masks"
    ran = run("segment", "--queries", table, "--model", checkpoint, "--out", out, "--format", "json")
    assert ran.code == 0, ran.err
    found = [json.loads(line) for line in ran.out.splitlines()]
    assert [one["query"] for one in found] == ["the cat", "left, behind", "a dog"]
    assert len({one["mask"] for one in found}) == 3
    model = tp.load(checkpoint)
    for one in found:
        mask = model.segment(one["image"], one["query"]).masks[0].numpy()
        assert np.array_equal(np.asarray(Image.open(one["mask"])) == 255, mask)


def test_a_table_of_json_lines(run: Runner, album: Path, tmp_path: Path) -> None:
    table = album / "queries.jsonl"
    rows = [{"image": "photo0.png", "query": "the cat"}, {"image": "photo2.png", "query": "a dog"}]
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ran = run("segment", "--queries", table, *FAKE, "--out", tmp_path / "masks")
    assert (ran.code, ran.err) == (0, "")
    assert sorted(masks_in(tmp_path / "masks")) == ["photo0.png", "photo2.png"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("image,query\n", ("no queries",)),
        ("picture,query\na.png,cat\n", ("no column image", "name image and query first")),
        ("image,query\n,cat\n", ("line 2", "image is empty, expected a path")),
        ("image,query\na.png, \n", ("line 2", "query is empty, expected a text")),
        (None, ("queries.csv", "cannot be read")),
    ],
)
def test_bad_tables(run: Runner, tmp_path: Path, text: str | None, parts: tuple[str, ...]) -> None:
    if text is not None:
        (tmp_path / "queries.csv").write_text(text, encoding="utf-8")
    ran = run("segment", "--queries", tmp_path / "queries.csv", *FAKE, "--out", tmp_path / "masks")
    assert_one_line(ran, *parts)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("{photo}", "cat", "--queries", "{photo}", "--out", "{tmp}/m"), ("--queries", "leave out")),
        (("--out", "{tmp}/m"), ("QUERY", "missing")),
        (("{photo}", "cat", "--overwrite", "--out", "{tmp}/m.png"), ("--overwrite has no effect",)),
        (("{photo}", "cat", "--batch-size", "2", "--out", "{tmp}/m.png"), ("--batch-size has no effect",)),
        (("{album}", "cat", "--batch-size", "0", "--out", "{tmp}/m"), ("--batch-size", "at least 1")),
        (
            ("{album}", "cat", "--batch-size", "2", "--out", "{tmp}/m", "--overlay", "{tmp}/o"),
            ("--batch-size has no effect with --overlay",),
        ),
    ],
)
def test_bad_combinations(
    run: Runner, album: Path, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    places = {"photo": album / "photo0.png", "album": album, "tmp": tmp_path}
    assert_one_line(run("segment", *(text.format(**places) for text in arguments), *FAKE), *parts)


# progress -------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("piped", [False, True])
def test_a_terminal_has_a_bar_and_a_pipe_only_its_lines(monkeypatch: pytest.MonkeyPatch, piped: bool) -> None:
    out, err = io.StringIO() if piped else Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with progress.counted("images", 3) as report:
        for done in (1, 2, 3):
            print(f"wrote {done}")
            report(done)
    assert "3/3" in err.getvalue()
    assert (out.getvalue() == "wrote 1\nwrote 2\nwrote 3\n") == piped
    if not piped:
        assert "wrote 3" in err.getvalue()  # above the bar, on the same terminal


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.counted("images", 3) as report:
        report(1)
    assert capsys.readouterr() == ("", "")
