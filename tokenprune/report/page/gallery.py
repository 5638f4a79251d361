"""The gallery of a page: which samples are worth a look, and their pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from tokenprune.datasets.base import Scene
from tokenprune.datasets.validation import numbered_scenes
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.report.page.data import Group, Study
from tokenprune.report.page.pictures import image_uri, mask_uri, packed_cells
from tokenprune.sweeps.config import SweepConfig
from tokenprune.sweeps.entries import DatasetEntry
from tokenprune.sweeps.fingerprint import of_scene, same_scene
from tokenprune.sweeps.plan import groups_of
from tokenprune.sweeps.results import stored_masks
from tokenprune.sweeps.store import Store, reading
from tokenprune.utils.masks import foreground

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = 48  # of all groups together
BYTES = 5_500_000  # of their pictures
DIGITS = 4  # of IoUs, for equal orders here and in the page
Key = tuple[int, int, int]  # seed, scene, query


def gallery_data(study: Study, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """For each group the IoUs of all queries, and the pictures of the samples that were chosen.

    Where the data cannot be read, or no masks were stored, `note` says so in one line, and there are no samples.
    """
    if not study.groups:
        return []
    share = max(1, samples // len(study.groups))
    with reading(study.folder) as store:
        return [_of_group(study, store, group, share, BYTES // len(study.groups)) for group in study.groups]


def _of_group(study: Study, store: Store, group: Group, count: int, limit: int) -> dict[str, Any]:
    table = iou_table(group)
    found: dict[str, Any] = {
        "labels": [row.label for row in group.rows],
        "budgets": [row.line.budget for row in group.rows],
        "ious": [[None if value != value else value for value in table[row.label].tolist()] for row in group.rows],
        "samples": [],
        "note": "",
    }
    try:
        made = _samples(study, store, group, table, count)
    except TokenPruneError as error:
        found["note"] = f"No pictures: {' '.join(str(error).split())}"
        return found
    size = 0
    for sample in made:
        size += len(json.dumps(sample))
        if size > limit and found["samples"]:
            break
        found["samples"].append(sample)
    return found


def iou_table(group: Group) -> pd.DataFrame:
    """IoU of each query (seed, scene, query) in each row, by label; NaN where it was not run."""
    found: pd.DataFrame = group.records.pivot(index=["seed", "scene", "query"], columns="label", values="iou")
    rounded: pd.DataFrame = found.round(DIGITS)
    return rounded


def chosen(group: Group, table: pd.DataFrame, count: int) -> list[Key]:
    """The samples of a gallery, most important first.

    In turns, the worst of each method and the largest difference of each pair of methods at equal budget, then the
    second worst, and so on.

    Args:
        group: of methods.
        table: of `iou_table`.
        count: of samples.
    """
    values = {label: np.asarray(table[label], dtype=np.float64) for label in table.columns}
    orders = [np.argsort(values[row.label], kind="stable") for row in group.rows]  # NaN comes last
    budgets: list[float | None] = [*group.budgets] or [None]
    for budget in budgets:
        for first, second in combinations([row.label for row in group.at(budget)], 2):
            gap = np.abs(values[first] - values[second])
            orders.append(np.argsort(-gap, kind="stable"))
    turns = (place for turn in zip_longest(*orders) for place in turn)
    places = islice(dict.fromkeys(turns), count)
    keys = (table.index[int(place)] for place in places)
    return [(int(seed), int(scene), int(query)) for seed, scene, query in keys]


def _samples(study: Study, store: Store, group: Group, table: pd.DataFrame, count: int) -> list[dict[str, Any]]:
    if not any(True for _ in store.rows("SELECT 1 FROM records WHERE mask IS NOT NULL LIMIT 1")):
        raise InputError("the sweep stored no masks (--no-masks)")
    keys = chosen(group, table, count)
    scenes = _scenes(study, group, {(seed, scene) for seed, scene, _ in keys})
    places = {key: number for number, key in enumerate(table.index)}
    by_key = dict(iter(group.records.groupby(["seed", "scene", "query"], sort=False)))
    made = []
    for key in keys:
        records = by_key[key]
        scene = scenes[key[:2]]
        is_there = key[2] < len(scene.queries)
        if not is_there or not same_scene(of_scene(scene), records.scene_digest.iloc[0]):
            raise InputError(f"scene {scene.id!r} of {group.dataset} is not the one that was run; its data changed")
        made.append({"place": places[key], **_sample(store, group, scene, key, records)})
    return made


def _scenes(study: Study, group: Group, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], Scene]:
    """Scenes by (seed, number), read anew from the dataset."""
    try:
        config = SweepConfig.model_validate(study.config)
    except ValidationError as error:
        raise InputError(f"the sweep's configuration cannot be read ({error.error_count()} problems)") from None
    hashes = set(group.records.configuration)
    sources: dict[int, DatasetEntry] = {}
    for one in groups_of(config):
        if any(configuration.hash in hashes for configuration in one.configurations):
            sources[one.seed] = one.dataset
    found: dict[tuple[int, int], Scene] = {}
    for seed in sorted({seed for seed, _ in wanted}):
        if seed not in sources:
            raise InputError(f"the sweep's configuration no longer holds {group.dataset!r} with seed {seed}")
        numbers = {number for its, number in wanted if its == seed}
        for number, scene in _read(sources[seed], config.limit, seed, numbers):
            found[seed, number] = scene
    missing = sorted(wanted - found.keys())
    if missing:
        raise InputError(f"dataset {group.dataset!r} has no scene number {missing[0][1]} any more")
    return found


def _read(entry: DatasetEntry, limit: int | None, seed: int, numbers: set[int]) -> Iterator[tuple[int, Scene]]:
    scenes = numbered_scenes(entry.make(), entry.split, limit, seed, lambda number, queries: number in numbers)
    return islice(scenes, len(numbers))


def _sample(store: Store, group: Group, scene: Scene, key: Key, records: pd.DataFrame) -> dict[str, Any]:
    seed, number, query = key
    hashes = dict(zip(records.configuration, records.label, strict=True))
    order = {row.label: place for place, row in enumerate(group.rows)}
    stored = stored_masks(store, number, query, list(hashes))
    height, width = scene.image.shape[:2]
    first = records.iloc[0]
    return {
        "name": str(first["sample"]),
        "seed": seed,
        "text": str(first.text),
        "kind": str(first.kind),
        "size": first["size"] if isinstance(first["size"], str) else "empty",
        "tokens": int(first.image_tokens),
        "image": image_uri(scene.image),
        "target": mask_uri(foreground(np.asarray(scene.queries[query].mask))),
        "runs": {
            order[hashes[hashed]]: {"mask": mask_uri(mask), "stages": _stages(stages, height, width)}
            for hashed, (mask, stages) in stored.items()
        },
    }


def _stages(stages: Sequence[Mapping[str, Any]], height: int, width: int) -> list[dict[str, Any]]:
    """Stages for drawing; without `grid`, of stores that lack it or images without places, a stage is only counted."""
    found = []
    for stage in stages:
        one: dict[str, Any] = {"name": stage["name"], "layer": stage["layer"], "kept": len(stage["kept"])}
        rows, columns = stage.get("grid", (0, 0))
        if rows and columns:
            top, left, bottom, right = stage["box"]
            cells = stage["kept"] if stage["cells"] is None else stage["cells"]
            one["grid"] = [rows, columns]
            one["box"] = [top / height, left / width, bottom / height, right / width]
            one["cells"] = packed_cells(cells, rows * columns)
            if stage["parked"]:
                one["parked"] = packed_cells(stage["parked"], rows * columns)
        found.append(one)
    return found
