"""`tokenprune data check` and `data show`, and comparisons on datasets that are read from files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest
from cli_fixtures import Runner, assert_one_line, run
from PIL import Image
from refer_files import ref, write_refer

__all__ = ["run"]  # the fixture

pytest.importorskip("pycocotools")

FORMATS: dict[str, Callable[[Path], Path]] = {
    "reasonseg": files.reasonseg,
    "coco": files.coco,
    "folder": files.folder,
    "muse": files.muse,
}
COUNTS = {  # scenes, queries, empty targets, queries with ignored pixels
    "reasonseg": (6, 6, 1, 2),
    "coco": (2, 3, 0, 1),
    "folder": (2, 3, 1, 0),
    "muse": (3, 4, 1, 0),
}


def checked(run: Runner, *words: object) -> tuple[int, dict[str, Any]]:
    """The exit code, and what `data check --format json` says about each split."""
    ran = run("data", "check", *words, "--format", "json")
    return ran.code, {split["split"]: split for split in json.loads(ran.out)["splits"]}


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from tokenprune.cli.app import main
try:
    main(["data", "check", "--help"])
finally:
    print("heavy:", sorted({"torch", "transformers", "numpy", "matplotlib", "PIL"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "heavy: []" in done.stdout) == (0, True), done.stderr
    assert "--split" in done.stdout


@pytest.mark.parametrize("name", FORMATS)
def test_complete_datasets_pass(run: Runner, tmp_path: Path, name: str) -> None:
    code, found = checked(run, f"{name}:{FORMATS[name](tmp_path)}", "--split", "val")
    assert (code, found["val"]["problems"]) == (0, [])
    counts = [found["val"][key] for key in ("scenes", "queries", "empty", "with_ignored")]
    assert tuple(counts) == COUNTS[name]
    assert sum(found["val"]["kinds"].values()) == found["val"]["queries"]


def test_forms_of_images_are_counted(run: Runner, tmp_path: Path) -> None:
    place = files.reasonseg(tmp_path)
    code, found = checked(run, f"reasonseg:{place}")
    assert (code, list(found)) == (0, ["val", "test"])
    expected = {"turned by EXIF": 1, "grey": 1, "CMYK": 1, "16 bits": 0, "palette": 0, "transparency": 0}
    assert found["val"]["images"] == expected
    _, found = checked(run, f"folder:{files.folder(tmp_path / 'folder')}", "--split", "val")
    assert {form: number for form, number in found["val"]["images"].items() if number} == {"grey": 1, "16 bits": 1}


def test_the_table_says_the_same(run: Runner, tmp_path: Path) -> None:
    ran = run("data", "check", f"muse:{files.muse(tmp_path)}")
    assert ran.code == 0
    lines = {" ".join(line.split()) for line in ran.out.splitlines()}
    assert {"muse val", "scenes 3", "queries 4", "of kind multiple 1", "for several objects 1", "problems 0"} <= lines
    assert "val, scenes" in ran.err


def test_every_problem_is_collected(run: Runner, tmp_path: Path) -> None:
    place = files.reasonseg(tmp_path)
    val = place / "val"
    (val / "a-plain.jpg").unlink()
    (val / "b-old-encoding.json").write_text("{")
    (val / "c-in-each-other.json").unlink()
    (val / "d-all-ignored.jpg").write_bytes((val / "d-all-ignored.jpg").read_bytes()[:300])
    files.reasonseg_entry(val, "e-nothing", [{"label": "target", "points": [[1, 2], [5, 2]]}])
    (val / "g-empty.jpg").write_bytes(b"")
    code, found = checked(run, f"reasonseg:{place}")
    assert code == 1
    assert [(problem["scene"], problem["kind"]) for problem in found["val"]["problems"]] == [
        ("a-plain", "missing image"),
        ("b-old-encoding", "annotation"),
        ("c-in-each-other", "missing file"),
        ("d-all-ignored", "image"),
        ("e-nothing", "target"),
        ("g-empty", "missing file"),
        ("g-empty", "image"),
    ]
    assert found["val"]["problem_counts"]["target"] == 1
    assert found["test"]["problems"] == []
    assert all("\n" not in problem["message"] for problem in found["val"]["problems"])
    ran = run("data", "check", f"reasonseg:{place}", "--split", "val")
    assert ran.code == 1
    assert "missing images" in ran.out
    assert f"'{val / 'a-plain.jpg'}': no such file" in ran.out


def test_sizes_that_differ_and_damaged_splits(run: Runner, tmp_path: Path) -> None:
    file = files.coco(tmp_path)
    files.image(tmp_path / "images" / f"{3:012d}.jpg", width=20)
    code, found = checked(run, f"coco:{file}")
    assert (code, found["val"]["problem_counts"]["size"]) == (1, 1)
    file.write_text("{")
    code, found = checked(run, f"coco:{file}")
    assert (code, found["val"]["problem_counts"]["split"]) == (1, 1)
    assert "line 1: not JSON" in found["val"]["problems"][0]["message"]


def test_references_that_cannot_be_used_are_listed_one_by_one(run: Runner, tmp_path: Path) -> None:
    asked = [ref(0, 101, "val", "fine", " "), ref(1, 102, "val", "as well")]
    asked += [ref(number, 900 + number, "val", "gone", image_id=7) for number in range(2, 14)]
    root = write_refer(tmp_path, references=asked)
    code, found = checked(run, f"refcoco:{root}")
    assert (code, found["val"]["queries"], found["val"]["problem_counts"]["annotation"]) == (1, 2, 13)
    assert found["val"]["problems"][-1]["message"] == "refs whose annotation is not in instances.json: ref 13"
    assert found["val"]["warnings"] == []
    code, found = checked(run, f"refcoco:{write_refer(tmp_path / 'whole')}")
    assert (code, {split: one["problems"] for split, one in found.items() if one["problems"]}) == (0, {})


def test_images_that_may_be_annotated_as_they_are_stored_are_told(run: Runner, tmp_path: Path) -> None:
    file, exif = files.coco(tmp_path), Image.Exif()
    exif[files.EXIF_ORIENTATION] = 3
    picture = tmp_path / "images" / f"{3:012d}.jpg"
    with Image.open(picture) as opened:
        opened.save(picture, exif=exif)
    code, found = checked(run, f"coco:{file}")
    assert (code, found["val"]["images"]["turned by EXIF"]) == (0, 1)
    (said,) = found["val"]["warnings"]
    assert "has the EXIF orientation 3, and its annotations may be for the upright or the stored image" in said
    assert said in " ".join(run("data", "check", f"coco:{file}").out.split())


def test_a_late_query_is_shown_without_reading_the_ones_before(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    place = files.reasonseg(tmp_path)
    (place / "val" / "a-plain.jpg").write_bytes(b"damaged")
    words = ("data", "show", f"reasonseg:{place},texts=all", "--out", tmp_path / "query.png")
    ran = run(*words, "--index", 6)
    assert ran.code == 0
    assert ran.out.endswith(": 'the thing that holds water'\n")
    assert_one_line(run(*words, "--index", 1), "a-plain.jpg")


def test_a_limit_counts_queries(run: Runner, tmp_path: Path) -> None:
    _, found = checked(run, f"reasonseg:{files.reasonseg(tmp_path)},texts=all", "--split", "val", "--limit", 1)
    assert (found["val"]["scenes"], found["val"]["queries"]) == (1, 1)


def test_datasets_without_files(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = checked(run, "shapes", "--limit", 3, "--split", "test")
    assert (code, found["test"]["queries"]) == (0, 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two_halves.py").write_text(
        "import numpy as np\n"
        "from tokenprune.datasets.base import Dataset, Query, Scene\n"
        "class Halves(Dataset):\n"
        "    name, splits, kinds = 'halves', ('only',), ('half',)\n"
        "    def scenes(self, split, limit=None, seed=0):\n"
        "        yield Scene('a', np.zeros((4, 6, 3), np.uint8), [Query('all', 'half', np.ones((4, 6), bool))])\n"
        "        yield Scene('b', np.zeros((4, 6, 3), np.uint8), [Query('all', 'half', np.ones((9, 6), bool))])\n"
    )
    code, found = checked(run, "two_halves:Halves")
    assert (code, found["only"]["queries"], found["only"]["problem_counts"]["split"]) == (1, 1, 1)
    assert "bool [9, 6], expected bool [4, 6]" in found["only"]["problems"][0]["message"]
    ran = run("data", "show", "two_halves:Halves", "--out", "half.png")
    assert (ran.code, ran.out) == (0, "wrote half.png: 'all'\n")


@pytest.mark.parametrize("name", FORMATS)
def test_a_query_is_drawn(run: Runner, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "query.png"
    ran = run("data", "show", f"{name}:{FORMATS[name](tmp_path)}", "--index", 1, "--out", out)
    assert ran.code == 0, ran.err
    with Image.open(out) as picture:
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert min(picture.size) > 200
    assert len(colours) > 20


def test_pixels_that_do_not_count_are_drawn_in_orange(run: Runner, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place, orange = files.reasonseg(tmp_path), np.array([0.902, 0.624, 0.0]) * 255

    def has_orange(index: int) -> bool:
        out = tmp_path / f"{index}.png"
        assert run("data", "show", f"reasonseg:{place}", "--index", index, "--out", out).code == 0
        with Image.open(out) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(float)
        return bool((np.abs(pixels - orange).max(-1) < 3).any())

    assert has_orange(2)
    assert not has_orange(0)


def test_what_is_left_out_is_told_in_one_line(run: Runner, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = files.reasonseg(tmp_path)
    (place / "val" / "a-plain.jpg").unlink()
    ran = run("data", "show", f"reasonseg:{place},missing=skip", "--out", tmp_path / "query.png")
    assert ran.code == 0
    (line,) = ran.err.splitlines()
    assert line.startswith("warning: dataset 'reasonseg', split 'val': 1 of 6 images, of 1 queries, are missing: ")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("check", "reasonsegg:PLACE"), ("unknown dataset 'reasonsegg'; did you mean 'reasonseg'",)),
        (("check", "reasonseg"), ("is read from files: give their place",)),
        (("check", "reasonseg:/no/where"), ("nothing is at '/no/where'",)),
        (("check", "reasonseg:PLACE,text=all"), ("did you mean 'texts'",)),
        (("check", "reasonseg:PLACE", "--split", "train"), ("unknown split", "known: val, test")),
        (("check", "reasonseg:PLACE", "--limit", "0"), ("limit", "at least 1")),
        (("show", "reasonseg:PLACE", "--out", "x.jpg"), ("expected .png",)),
        (("show", "reasonseg:PLACE", "--out", "x.png", "--index", "99"), ("has no query number 99",)),
        (("show", "reasonseg:PLACE", "--out", "x.png", "--index", "-1"), ("index", "at least 0")),
        (("show", "reasonseg:PLACE", "--out", "x.png", "--split", "vall"), ("did you mean 'val'",)),
        (("show", "reasonseg:PLACE"), ("--out", "see 'tokenprune data show --help'")),
        (("check",), ("DATASET", "see 'tokenprune data check --help'")),
    ],
)
def test_mistakes_are_one_line(run: Runner, tmp_path: Path, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    place = str(files.reasonseg(tmp_path))
    assert_one_line(run("data", *(word.replace("PLACE", place) for word in words)), *parts)


@pytest.mark.parametrize("name", FORMATS)
def test_strategies_are_compared_on_it(run: Runner, tmp_path: Path, name: str) -> None:
    place = FORMATS[name](tmp_path)
    words = ("--model", "lisa-tiny", "--strategies", "none,uniform", "--limit", 4, "--timing-samples", 0)
    ran = run("compare", "--dataset", f"{name}:{place}", "--split", "val", *words, "--format", "json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["dataset"], found["samples"]) == (name, min(4, COUNTS[name][1]))
    assert [row["strategy"] for row in found["rows"]] == ["none", "uniform"]
    assert all(0 <= row["giou"] <= 1 for row in found["rows"])
