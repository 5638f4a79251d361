"""The scenes of a data set, each held to what the protocol says, so that a data set's mistakes carry its name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.by_path import dataset_at
from tokenprune.errors import PluginError, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.plugins.attribution import blamed
from tokenprune.utils.arguments import instance, shown, unicode_problem, whole_number
from tokenprune.utils.masks import target_problem


def made(name: str) -> Dataset:
    """The data set of that name, or of the class at "module:Class" (see `tokenprune.datasets.by_path`).

    Raises:
        UnknownNameError: no such data set.
        PluginError: it cannot be imported or made.
    """
    by_path = ":" in name and name not in registry.datasets()
    entry = None if by_path else registry.get("datasets", name)
    data: Dataset = dataset_at(name) if entry is None else entry.call()
    splits = getattr(data, "splits", None)
    if not isinstance(splits, (tuple, list)) or not all(isinstance(split, str) for split in splits):
        problem = f"has splits {splits!r}, expected a tuple of names such as ('val',)"
        raise PluginError(f"data set {name!r} {problem}") if entry is None else entry.refusal(problem)
    return data


def check_request(dataset: Dataset | str, split: str, limit: int, seed: int) -> Dataset:
    """The data set, once it is known that these queries can be asked of it.

    Raises:
        UnknownNameError: no such data set or split.
        OptionError: a limit or seed out of range, or an argument of another kind.
        PluginError: the data set cannot be imported or made.
    """
    whole_number("limit", limit, 1)
    whole_number("seed", seed, 0)
    instance("dataset", dataset, (str, Dataset), "a data set, or the name of one, such as 'shapes'")
    instance("split", split, str, "the name of a split, such as 'val'")
    data = made(dataset) if isinstance(dataset, str) else dataset
    if split not in data.splits:
        raise UnknownNameError.among(f"split of data set {data.name!r}", split, data.splits)
    return data


def scenes_of(data: Dataset, split: str, limit: int, seed: int) -> Iterator[Scene]:
    """The scenes of a split, checked one by one; what their user raises is not the data set's.

    Raises:
        PluginError: `scenes` raised what is no TokenPruneError, or gave no sound scenes, or more queries than `limit`.
    """

    def refuse(problem: str) -> PluginError:
        entry = registry.datasets().get(data.name)
        if entry is not None and entry.load() is type(data):
            return entry.refusal(problem, "fix or uninstall it")
        return PluginError(f"data set {data.name!r} ({type(data).__name__}) {problem}")

    def failing(found: str) -> PluginError:
        return refuse(f"failed in scenes() with {found}")

    queries = 0
    with blamed(failing):
        scenes = iter(data.scenes(split, limit, seed))
    while True:
        with blamed(failing):
            scene = next(scenes, None)
        if scene is None:
            return
        problem = _problem(scene)
        if problem:
            where = f"scene {scene.id!r}" if isinstance(scene, Scene) else f"after {queries} queries"
            raise refuse(f"gave in scenes(), {where}, {problem}")
        queries += len(scene.queries)
        if queries > limit:
            raise refuse(f"gave {queries} queries or more, expected at most limit = {limit}")
        yield scene


def _problem(scene: object) -> str:
    """What is wrong with a scene, and what is expected; empty for a sound one."""
    if not isinstance(scene, Scene):
        return f"{type(scene).__name__}, expected a Scene"
    image = scene.image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return f"an image that is {_kind(image)}, expected uint8 [H, W, 3]"
    if not isinstance(scene.queries, (list, tuple)) or not scene.queries:
        return f"queries {scene.queries!r}, expected a list of at least one Query"
    return next((problem for query in scene.queries if (problem := _query_problem(query, image.shape[:2]))), "")


def _query_problem(query: object, size: tuple[int, ...]) -> str:
    if not isinstance(query, Query):
        return f"{type(query).__name__} among its queries, expected a Query"
    for name, text in (("text", query.text), ("kind", query.kind)):
        if not isinstance(text, str) or not text.strip():
            return f"a query whose {name} is {shown(text)}, expected words"
        if problem := unicode_problem(text):
            return f"a query whose {name} {text[:60]!a} {problem}"
    mask = query.mask
    if not isinstance(mask, np.ndarray) or mask.shape != size or mask.dtype.kind not in "buif":
        return f"the mask of {query.text!r}, which is {_kind(mask)}, expected bool {list(size)}, the image's size"
    problem = target_problem(mask)
    return f"the mask of {query.text!r}, which {problem}" if problem else ""


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
