"""Walks a split of a dataset, opens every image and draws every target; collects what is there and what is wrong."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.datasets.base import Dataset, Query
from tokenprune.datasets.files.dataset import FileDataset, ListedScene
from tokenprune.datasets.validation import scenes_of
from tokenprune.errors import DataWarning, InputError, PluginError, TokenPruneError
from tokenprune.plugins.attribution import blamed
from tokenprune.utils.masks import foreground, ignored, target_problem

Progress = Callable[[str, int, int], None]
GENERATED = 200  # queries of a split that are walked by default, if the dataset is not read from files

PROBLEMS = {
    "split": "splits that cannot be read",
    "annotation": "damaged annotations",
    "missing image": "missing images",
    "missing file": "missing masks or annotations",
    "image": "unreadable images",
    "size": "images of another size than their annotations",
    "target": "targets that cannot be drawn",
}
"""Kinds of problems, in the order in which a scene is checked, and what they are called in a report."""

FORMS = ("turned by EXIF", "grey", "CMYK", "16 bits", "palette", "transparency")
"""Forms of image files that are counted: all are read, but other tools may read them in another way."""


@dataclass(frozen=True)
class Problem:
    """Something that a run would stop at.

    Attributes:
        kind: one of `PROBLEMS`.
        scene: its id; empty if it concerns the whole split.
        message: in one line.
    """

    kind: str
    scene: str
    message: str


@dataclass
class Inspection:
    """What a split holds.

    Attributes:
        split: its name.
        scenes, queries: numbers of those that were listed.
        kinds: number of queries by kind.
        sentences: queries that are complete sentences.
        several: queries for several objects.
        empty: drawn targets without a pixel.
        with_ignored: drawn targets with pixels that do not count.
        ignored_pixels: the number of these pixels, in all targets.
        forms: number of images by form, see `FORMS`.
        problems: all that were found.
        warnings: what a run would warn of, such as annotations that may be for an image as it is stored.
    """

    split: str
    scenes: int = 0
    queries: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sentences: int = 0
    several: int = 0
    empty: int = 0
    with_ignored: int = 0
    ignored_pixels: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """The number of problems of a kind."""
        return sum(problem.kind == kind for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("kinds", "forms", "problems")}
        return {
            **plain,
            "kinds": dict(self.kinds),
            "images": {form: self.forms[form] for form in FORMS},
            "problem_counts": {kind: self.count(kind) for kind in PROBLEMS},
            "problems": [vars(problem) for problem in self.problems],
        }


def inspected(
    data: Dataset, split: str, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> Inspection:
    """Walk the first `limit` queries of a split; problems are collected, not raised.

    A dataset that is not read from files gives its scenes in order, so that its first problem is also the last.

    Args:
        data: the dataset.
        split: of it.
        limit: number of queries; by default all, or 200 of a dataset that is not read from files.
        seed: of the dataset.
        progress: called with "scenes", the number done and the number in all.
    """
    found = Inspection(split)
    walk = _walk_files if isinstance(data, FileDataset) else _walk_scenes
    try:
        with (
            blamed(lambda said: PluginError(f"dataset {data.name!r} ({type(data).__name__}) failed with {said}")),
            _warnings_into(found.warnings),
        ):
            walk(data, found, limit, seed, progress or (lambda what, done, total: None))
    except TokenPruneError as error:
        found.problems.append(Problem("split", "", _line(error)))
    return found


def forms_of(path: Path) -> list[str]:
    """The `FORMS` of an image file, from its header; none if it cannot be read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                mode, transparent = image.mode, "transparency" in image.info
                turned = image.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:  # as varied as the formats; opening the image reports it
        return []
    with path.open("rb") as file:
        header = file.read(25)
    deep = mode.startswith("I") or (header.startswith(b"\x89PNG") and header[24] == 16)  # of colours, PIL keeps 8 bits
    held = {
        "turned by EXIF": turned,
        "grey": mode in ("1", "L", "LA", "La", "F") or mode.startswith("I"),
        "CMYK": mode == "CMYK",
        "16 bits": deep,
        "palette": mode in ("P", "PA"),
        "transparency": transparent or mode in ("LA", "La", "PA", "RGBA", "RGBa"),
    }
    return [form for form in FORMS if held[form]]


@contextmanager
def _warnings_into(found: list[str]) -> Iterator[None]:
    """Collect DataWarnings, each once, except about what is left out: that is counted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            yield
        finally:
            said = [warning for warning in caught if issubclass(warning.category, DataWarning)]
            found += dict.fromkeys(_line(warning.message) for warning in said)
    for warning in caught:
        if warning not in said:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _walk_files(data: Any, found: Inspection, limit: int | None, seed: int, progress: Progress) -> None:
    found.problems += [Problem("annotation", "", _line(message)) for message in data.unusable(found.split)]
    if found.problems:
        data = copy(data)
        data.options = data.options.model_copy(update={"missing": "skip"})  # they are in the list
    with warnings.catch_warnings():
        if found.problems:
            warnings.simplefilter("ignore", DataWarning)
        scenes = data.listed(found.split)
    seen: set[Path] = set()
    for number, scene in enumerate(scenes):
        left = None if limit is None else limit - found.queries
        if left is not None and left <= 0:
            break
        progress("scenes", number, len(scenes))
        listed = scene.queries[:left]
        if not scene.problem:
            found.scenes += 1
        for query in listed:
            _count(found, query)
        if scene.image not in seen and not scene.problem and os.path.isfile(scene.image):
            seen.add(scene.image)
            found.forms.update(forms_of(scene.image))
        _check(data, scene, listed, found)
    progress("scenes", len(scenes), len(scenes))


def _check(data: FileDataset, scene: ListedScene, listed: Any, found: Inspection) -> None:
    def add(kind: str, message: object) -> None:
        found.problems.append(Problem(kind, scene.id, _line(message)))

    if scene.problem:
        return add("annotation", scene.problem)
    missing = scene.missing()
    for path in missing:
        is_image = path == scene.image
        found_there = "no regular file" if os.path.exists(path) else "no such file"
        add("missing image" if is_image else "missing file", f"{str(path)!r}: {found_there}")
    if scene.image in missing:
        return None
    try:
        image = data.opened(scene)
    except InputError as error:
        return add("image", error)
    height, width = image.shape[:2]
    if problem := data.size_problem(scene, image):
        return add("size", problem)
    for query in listed:
        if missing:
            break
        try:
            drawn = data.drawn(scene, query, height, width)
        except InputError as error:
            add("target", error)
            continue
        if problem := _target_problem(drawn, (height, width)):
            add("target", f"query {drawn.id or drawn.text!r}: its mask {problem}")
        else:
            _count_target(found, drawn)
    return None


def _walk_scenes(data: Any, found: Inspection, limit: int | None, seed: int, progress: Progress) -> None:
    limit = GENERATED if limit is None else limit
    for scene in scenes_of(data, found.split, limit, seed):
        found.scenes += 1
        for query in scene.queries:
            _count(found, query)
            _count_target(found, query)
        progress("queries", found.queries, limit)


def _count(found: Inspection, query: Any) -> None:
    found.queries += 1
    found.kinds[query.kind] += 1
    found.sentences += bool(query.is_sentence)


def _count_target(found: Inspection, query: Query) -> None:
    pixels = int(ignored(query.mask).sum())
    found.several += len(query.targets) > 1
    found.empty += not foreground(query.mask).any()
    found.with_ignored += pixels > 0
    found.ignored_pixels += pixels


def _target_problem(query: Query, size: tuple[int, int]) -> str:
    for mask in (query.mask, *query.targets):
        if isinstance(mask, np.ndarray) and mask.shape != size:
            return f"is {list(mask.shape)}, expected {list(size)}, the image's size"
        if problem := target_problem(mask):
            return problem
    return ""


def _line(message: object) -> str:
    return " ".join(str(message).split())
