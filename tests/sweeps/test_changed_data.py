"""Data that change under a sweep: a stored scene that is another now is refused, what was added runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import dataset_files
import numpy as np
import pytest
from fake_segmentation import FakeModel
from PIL import Image
from sweep_folders import START, config_of, folder_of, samples

import tokenprune as tp
from tokenprune.errors import DataWarning, InputError

pytestmark = pytest.mark.usefixtures("fakes")

CHANGED = r"scene '.*' of folder is not the one that was run before.*; start a new folder"


def as_fresh(run: Path, config: dict[str, Any], tmp_path: Path) -> None:
    tp.sweep(config, tmp_path / "fresh")
    assert samples(run) == samples(tmp_path / "fresh")


def test_a_row_in_the_middle(tmp_path: Path) -> None:
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    tp.sweep(config_of(data), run)
    folder_of(data, {"a.png": START["a.png"], "new.png": ["x"], **START})
    with pytest.raises(InputError, match=CHANGED):
        tp.sweep(config_of(data), run)
    folder_of(data, {**START, "c.png": ["a cat", "the dog"]})
    with pytest.raises(InputError, match=CHANGED):
        tp.sweep(config_of(data), run)


def test_rows_at_the_end_run(tmp_path: Path) -> None:
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    tp.sweep(config_of(data), run)
    grown = {"a.png": [*START["a.png"], "one more"], "b.png": START["b.png"], "c.png": START["c.png"], "d.png": ["x"]}
    folder_of(data, grown)
    assert tp.sweep(config_of(data), run).added == 2 * (3 + 1)
    as_fresh(run, config_of(data), tmp_path)


def test_a_row_that_is_gone(tmp_path: Path) -> None:
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    tp.sweep(config_of(data), run)
    for fewer in ({"a.png": START["a.png"], "b.png": START["b.png"]}, {**START, "b.png": ["green"]}):
        folder_of(data, fewer)
        with pytest.raises(InputError, match=CHANGED):
            tp.sweep(config_of(data), run)


def test_a_late_image(tmp_path: Path) -> None:
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    (data / "b.png").rename(data / "later")
    config = config_of(data, entry={"missing": "skip"})
    with pytest.warns(DataWarning) as told:
        assert tp.sweep(config, run).added == 2 * 3
    assert [warning.category for warning in told].count(DataWarning) == 1
    (data / "later").rename(data / "b.png")
    with pytest.raises(InputError, match=CHANGED):
        tp.sweep(config, run)


def test_other_pixels(tmp_path: Path) -> None:
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    tp.sweep(config_of(data), run)
    kept = tmp_path / "kept"
    shutil.copytree(data, kept)
    for file in ("b-1.mask.png", "c.png"):
        pixels = np.asarray(Image.open(kept / file)).copy()
        Image.fromarray(~pixels if pixels.dtype == bool else 255 - pixels).save(data / file)
        with pytest.raises(InputError, match=CHANGED):
            tp.sweep(config_of(data), run)
        shutil.copy(kept / file, data / file)
    assert tp.sweep(config_of(data), run).added == 0


def test_another_place(tmp_path: Path) -> None:
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    tp.sweep(config_of(data), run)
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    assert tp.sweep(config_of(copy), run).added == 0
    os.utime(copy / "b.png", (1, 1))
    assert tp.sweep(config_of(copy), run).added == 0
    other = folder_of(tmp_path / "other", {"a.png": START["a.png"], "x.png": ["green", "the left"], "y.png": ["z"]})
    with pytest.raises(InputError, match=CHANGED):
        tp.sweep(config_of(other), run)


def test_another_polygon(tmp_path: Path) -> None:
    """Annotations that only the targets are drawn from."""
    data, run = dataset_files.reasonseg(tmp_path), tmp_path / "run"
    config = {"models": "fake", "datasets": f"reasonseg:{data}", "strategies": "whole"}
    tp.sweep(config, run)
    shapes = [dataset_files.shape("target", (2, 3, 31, 20))]
    times = os.stat(data / "val" / "a-plain.jpg")
    dataset_files.reasonseg_entry(
        data / "val", "a-plain", shapes, ["something that protects from the rain – “where is it?”"]
    )
    os.utime(data / "val" / "a-plain.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match="scene 'a-plain' of reasonseg is not the one"):
        tp.sweep(config, run)


def test_unchanged_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune.datasets.files.dataset import FileDataset

    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    tp.sweep(config_of(data), run)
    monkeypatch.delattr(FileDataset, "read")
    assert tp.sweep(config_of(data), run).added == 0


@pytest.mark.parametrize("protocol", ["forced", "glamm"])
def test_limits_that_go_up_and_down(tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the limits before, the samples are those of a fresh sweep."""
    monkeypatch.setattr(FakeModel, "one_conversation", protocol == "glamm", raising=False)
    many = {"a.png": [*"abcde"], "b.png": [*"fghij"], "c.png": [*"klmno"]}
    data, run = folder_of(tmp_path / "data", many), tmp_path / "run"
    for limit in (8, 9, 15, 7, None, 3):
        config = config_of(data, limit=limit, entry={"protocol": protocol})
        tp.sweep(config, run)
        tp.sweep(config, tmp_path / f"fresh-{limit}")
        assert samples(run) == samples(tmp_path / f"fresh-{limit}"), limit


@pytest.mark.parametrize(
    ("protocol", "together", "added"), [("forced", True, 4), ("lisa", True, 0), ("forced", False, 0)]
)
def test_a_lower_limit_in_one_conversation(
    tmp_path: Path, protocol: str, together: bool, added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where queries are asked together the rest of a scene is asked anew, since answers depend on those before."""
    monkeypatch.setattr(FakeModel, "one_conversation", together, raising=False)
    data, run = folder_of(tmp_path / "data", START), tmp_path / "run"
    grown = folder_of(data, {"a.png": ["x"], "b.png": [*"abcd"]})
    tp.sweep(config_of(grown, entry={"protocol": protocol}), run)
    assert tp.sweep(config_of(grown, limit=3, entry={"protocol": protocol}), run).added == added
