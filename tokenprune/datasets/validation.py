"""Checks of a dataset and its scenes against the protocol; errors carry the dataset's name."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from tokenprune.datasets import by_name
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.datasets.files.dataset import FileDataset
from tokenprune.errors import PluginError, PluginWarning, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.plugins.attribution import blamed
from tokenprune.utils.arguments import instance, shown, unicode_problem, whole_number
from tokenprune.utils.masks import target_problem


def check_request(dataset: Dataset | str, split: str, limit: int, seed: int) -> Dataset:
    """The dataset, if it can provide these queries.

    Raises:
        UnknownNameError: no such dataset or split.
        OptionError: a limit or seed out of range, or an argument of another type.
        PluginError: the dataset cannot be imported or instantiated.
    """
    whole_number("limit", limit, 1)
    whole_number("seed", seed, 0)
    instance("dataset", dataset, (str, Dataset), "a dataset, or the name of one, such as 'shapes'")
    instance("split", split, str, "the name of a split, such as 'val'")
    data = by_name.dataset(dataset) if isinstance(dataset, str) else dataset
    if split not in data.splits:
        error = UnknownNameError.among(f"split of dataset {data.name!r}", split, data.splits)
        raise UnknownNameError(f"{error}; give one of them as split= (--split)")
    return data


def scenes_of(data: Dataset, split: str, limit: int, seed: int, *, any_kind: bool = False) -> Iterator[Scene]:
    """The scenes of a split, checked one by one; errors of the caller are not attributed to the dataset.

    If the dataset gives more than `limit` queries, the first ones are used, with a PluginWarning.

    Args:
        data: the dataset.
        split: of it.
        limit: number of queries.
        seed: of it.
        any_kind: also accept queries whose kind is not one of the dataset's `kinds`.

    Raises:
        PluginError: `scenes` takes other arguments, raised an unexpected exception, or gave invalid scenes.
    """

    refuse = partial(_refusal, data)
    failing = partial(_failed, data)
    kinds = getattr(data, "kinds", None)
    if not isinstance(kinds, (tuple, list)) or not all(isinstance(kind, str) for kind in kinds):
        raise refuse(f"has kinds {kinds!r}, expected a tuple of the kinds of its queries, such as ('phrase',)")
    taken = _other_arguments(data)
    if taken is not None:
        raise refuse(f"has scenes({taken}), expected scenes(split, limit=None, seed=0)")
    left = limit
    with blamed(failing):
        scenes = iter(data.scenes(split, limit, seed))
    while True:
        with blamed(failing):
            scene = next(scenes, None)
        if scene is None:
            return
        problem = _problem(scene, None if any_kind else kinds) if left else ""
        if problem:
            where = f"scene {scene.id!r}" if isinstance(scene, Scene) else f"after {limit - left} queries"
            raise refuse(f"gave in scenes(), {where}, {problem}")
        if not left or len(scene.queries) > left:
            advice = "only the first are taken; cut the last scene to meet it"
            warnings.warn(
                str(refuse(f"gave more queries than limit = {limit} allows; {advice}")), PluginWarning, stacklevel=2
            )
            if left:
                yield replace(scene, queries=scene.queries[:left])
            return
        left -= len(scene.queries)
        yield scene


def numbered_scenes(
    data: Dataset, split: str, limit: int | None, seed: int, wanted: Callable[[int, int], bool]
) -> Iterator[tuple[int, Scene]]:
    """Some scenes of a split with their numbers, checked as `scenes_of` does.

    Args:
        data: the dataset; of one that is read from files, only the wanted scenes are read.
        split: of it.
        limit: number of queries; None = all.
        seed: of it.
        wanted: from the number of a scene and of its queries to whether it is wanted.

    Raises:
        PluginError: as `scenes_of`.
        InputError: files of the dataset are missing or damaged.
    """
    if not isinstance(data, FileDataset):
        for number, scene in enumerate(scenes_of(data, split, sys.maxsize if limit is None else limit, seed)):
            if wanted(number, len(scene.queries)):
                yield number, scene
        return
    with blamed(partial(_failed, data)):
        listed = data.selected(split, limit)
    for number, one in enumerate(listed):
        if wanted(number, len(one.queries)):
            with blamed(partial(_failed, data)):
                scene = data.read(one)
            problem = _problem(scene, data.kinds)
            if problem:
                raise _refusal(data, f"gave scene {one.id!r}, {problem}")
            yield number, scene


def counted_scenes(data: Dataset, split: str, limit: int | None, seed: int) -> Iterator[tuple[int, int]]:
    """(number, how many queries) of all scenes of a split, without reading images. See `numbered_scenes`."""
    if isinstance(data, FileDataset):
        with blamed(partial(_failed, data)):
            listed = data.selected(split, limit)
        yield from ((number, len(one.queries)) for number, one in enumerate(listed))
        return
    for number, scene in enumerate(scenes_of(data, split, sys.maxsize if limit is None else limit, seed)):
        yield number, len(scene.queries)


def _refusal(data: Dataset, problem: str) -> PluginError:
    entry = registry.datasets().get(data.name)
    if entry is not None and entry.load() is type(data):
        return entry.refusal(problem, "fix or uninstall it")
    return PluginError(f"dataset {data.name!r} ({type(data).__name__}) {problem}")


def _failed(data: Dataset, found: str) -> PluginError:
    return _refusal(data, f"failed in scenes() with {found}")


def _other_arguments(data: Dataset) -> str | None:
    """The arguments that `scenes` takes, if it cannot be called as in the protocol; else None."""
    try:
        signature = inspect.signature(data.scenes)
    except (TypeError, ValueError):  # of a compiled function
        return None
    try:
        signature.bind("split", None, 0)
    except TypeError:
        return ", ".join(signature.parameters)
    return None


def _problem(scene: object, kinds: tuple[str, ...] | list[str] | None) -> str:
    """What is wrong with a scene, and what is expected; empty for a valid one."""
    if not isinstance(scene, Scene):
        return f"{type(scene).__name__}, expected a Scene"
    image = scene.image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return f"an image that is {_kind(image)}, expected uint8 [H, W, 3]"
    if not isinstance(scene.queries, (list, tuple)) or not scene.queries:
        return f"queries {scene.queries!r}, expected a list of at least one Query"
    if isinstance(scene.id, str) and (problem := unicode_problem(scene.id)):
        return f"an id that {problem}"
    found = (_query_problem(query, image.shape[:2], kinds) for query in scene.queries)
    return next((problem for problem in found if problem), "")


def _query_problem(query: object, size: tuple[int, ...], kinds: tuple[str, ...] | list[str] | None) -> str:
    if not isinstance(query, Query):
        return f"{type(query).__name__} among its queries, expected a Query"
    for name, text in (("text", query.text), ("kind", query.kind)):
        if not isinstance(text, str) or not text.strip():
            return f"a query whose {name} is {shown(text)}, expected words"
        if problem := unicode_problem(text):
            return f"a query whose {name} {text[:60]!a} {problem}"
    if isinstance(query.id, str) and (problem := unicode_problem(query.id)):
        return f"a query whose id {query.id[:60]!a} {problem}"
    if kinds is not None and query.kind not in kinds:
        listing = ", ".join(kinds) or "of which it has none"
        return f"{query.text!r} of kind {query.kind!r}, expected one of its kinds, {listing}"
    mask = query.mask
    if not isinstance(mask, np.ndarray) or mask.shape != size or mask.dtype.kind not in "buif":
        return f"the mask of {query.text!r}, which is {_kind(mask)}, expected bool {list(size)}, the image's size"
    problem = target_problem(mask)
    return f"the mask of {query.text!r}, which {problem}" if problem else ""


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
