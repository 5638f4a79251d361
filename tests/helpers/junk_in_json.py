"""A small file of each format of JSON, and how to change it in any one place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dataset_files as files

REMOVED = object()


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys and numbers that lead there."""
    yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*place, key))


def changed(value: Any, place: tuple[Any, ...], junk: Any) -> Any:
    if not place:
        return None if junk is REMOVED else junk
    whole = copy.deepcopy(value)
    inside = whole
    for key in place[:-1]:
        inside = inside[key]
    if junk is REMOVED:
        del inside[place[-1]]
    else:
        inside[place[-1]] = junk
    return whole


def reasonseg(root: Path) -> tuple[str, Path]:
    shapes = [files.shape("target", files.BIG), files.shape("ignore", files.SMALL)]
    return f"reasonseg:{root},texts=all", files.reasonseg_entry(root / "val", "a", shapes, ["x", "y"])


def coco(root: Path) -> tuple[str, Path]:
    file = files.coco(root)
    return f"coco:{file}", file


def coco_texts(root: Path) -> tuple[str, Path]:
    left = files.coco_annotation(1, 1, 17, [files.polygon(files.LEFT)], caption=["a", "b"], is_sentence=True)
    right = files.coco_annotation(2, 1, 18, files.compressed(files.filled(files.RIGHT)), caption="c")
    file = files.coco(root, [left, right])
    return f"coco:{file}", file


def muse(root: Path) -> tuple[str, Path]:
    return f"muse:{files.muse(root)}", root / "muse_val.json"
