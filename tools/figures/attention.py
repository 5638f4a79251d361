"""Where the decoder of a segmentation model attends, layer by layer: measured, and drawn.

python tools/figures/attention.py measure MODEL DATASET      docs/results/attention-MODEL.json
    [--split val] [--queries 100] [--example 18] [--name attention-MODEL]
python tools/figures/attention.py draw [NAME …]              docs/images/attention.svg and attention-maps.svg

`docs/attention.md` says what the measures are. No picture of a dataset is stored or drawn: the maps show the grid of
image tokens and the cells of the target alone.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attention_drawing
import numpy as np
import torch
from attention_tables import SHOWN, STORED, read
from numpy.typing import NDArray
from scipy.stats import rankdata
from stages import IMAGES

import tokenprune as tp
from tokenprune.datasets.base import Dataset, Query
from tokenprune.datasets.validation import check_request, scenes_of
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.reads.attention_tap import AttentionCall, tap
from tokenprune.errors import InputError
from tokenprune.evaluation.coverage import Box, numbered_cells, target_shares
from tokenprune.evaluation.environment import describe
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.evaluation.statistics import mean_interval

ROWS = ("mask_query", "last", "text")
PARTS = ("first", "before", "image", "behind")
Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class QueryAttention:
    """Where the rows of one prompt attend, without pruning. L layers, S positions, N image tokens, all of one image.

    Attributes:
        weights: by row, float [L, heads, S]: "mask_query", the position whose state becomes the mask; "last", the last
            of the prompt, with its forced answer; "text", the mean over all text behind the image.
        image: int64 [N], positions of the image tokens.
        grid: rows and columns of their cells.
        cells: int64 [N], each one's cell, row by row.
        target: bool [N], those of which the target covers at least half, or the one that it covers most of.
    """

    weights: dict[str, Numbers]
    image: NDArray[np.int64]
    grid: tuple[int, int]
    cells: NDArray[np.int64]
    target: NDArray[np.bool_]


def query_attention(model: SegmentationModel, encoded: Any, query: Query, box: Box | None) -> QueryAttention:
    """Run one query and read the attention of all layers, by the tap with which the engine reads single rows.

    Args:
        model: a segmentation model.
        encoded: what its `encode_image` gave.
        query: with its target.
        box: of the image, from its `grid_box`.

    Raises:
        InputError: image tokens without cells, or of several images.
    """
    decoder = find_decoder(model.decoder)
    calls: dict[int, AttentionCall] = {}
    layers = range(len(decoder.layers))
    with tap({decoder.attention(layer): partial(calls.__setitem__, layer) for layer in layers}):
        result = model.segment(encoded, [query.text], tp.strategy("none"), is_sentence=[query.is_sentence])
    trace = result.trace
    assert trace is not None
    layout = trace.layout.on_host
    grid, cells = numbered_cells(trace, 0)
    if (cells < 0).any():
        raise InputError(f"{model.name} has image tokens without cells of one grid; measure a model that has them all")
    image, text = layout.slots[0], layout.text_slots[0]
    rows = {name: layout.query_rows(name)[:, -1:] for name in ROWS[:2]} | {"text": text[None, text > image[-1]]}
    weights = {
        name: torch.stack([calls[layer].attention(places)[0].mean(1) for layer in layers]).double().cpu().numpy()
        for name, places in rows.items()
    }
    shares = target_shares(query.mask, trace, 0, box)
    target = shares >= min(0.5, shares.max())
    return QueryAttention(weights, image.numpy(), grid, cells.numpy(), target & (shares > 0))


def shares(weights: Numbers, image: NDArray[np.int64]) -> dict[str, Numbers]:
    """The parts of attention [L, S] on the first token, on other text before the image, on the image, and on text
    behind its start, the row itself included; they sum to 1: [L] each."""
    first, others = np.split(np.setdiff1d(np.arange(weights.shape[1]), image), [1])
    places = (first, others[others < image[0]], image, others[others > image[0]])
    return {name: weights[:, place].sum(1) for name, place in zip(PARTS, places, strict=True)}


def auc(scores: Numbers, target: NDArray[np.bool_]) -> Numbers:
    """The chance that a token of the target scores higher than another one; ties count half.

    Args:
        scores: [..., N].
        target: bool [N], neither all nor none.
    """
    count = int(target.sum())
    ranks = rankdata(scores, axis=-1)[..., target].sum(-1)
    return np.asarray((ranks - count * (count + 1) / 2) / (count * (len(target) - count)))


def spread(scores: Numbers, target: NDArray[np.bool_]) -> dict[str, Numbers]:
    """How attention [L, N] is spread over the image's tokens, in their order: [L] for each measure of the docs."""
    parts = scores / np.maximum(scores.sum(1, keepdims=True), 1e-30)
    count = parts.shape[1]
    top, quarter = max(round(count / 10), 1), count - round(count / 4)
    logs = np.log(np.maximum(parts, 1e-30))
    order = np.arange(count) - (count - 1) / 2
    ranks = rankdata(scores, axis=1) - (count + 1) / 2
    scale = np.sqrt((ranks**2).sum(1) * (order**2).sum())
    return {
        "target": parts[:, target].mean(1) * count,
        "auc": auc(scores, target),
        "top_tenth": np.sort(parts, 1)[:, -top:].sum(1),
        "entropy": -(parts * logs).sum(1) / np.log(count),
        "last_quarter": parts[:, quarter:].sum(1),
        "recency": ranks @ order / np.maximum(scale, 1e-30),
    }


def controls(maps: Numbers, targets: NDArray[np.bool_], scenes: NDArray[np.int64]) -> dict[str, tuple[Numbers, Any]]:
    """How well maps that know nothing of a query find its target: AUC [q, L] and scenes [q], where there is such a map.

    "auc_other_queries": the mean map of queries about the same picture that have other targets, so that the picture
    decides; "auc_other_scenes": that of all queries about other pictures, so that the position alone does.

    Args:
        maps: [Q, L, N].
        targets: [Q, N].
        scenes: [Q].
    """
    parts = maps / np.maximum(maps.sum(-1, keepdims=True), 1e-30)
    same = scenes[:, None] == scenes
    found = {}
    for name, known in (
        ("auc_other_queries", same & (targets[:, None] != targets).any(-1)),
        ("auc_other_scenes", ~same),
    ):
        numbers = np.flatnonzero(known.any(1))
        if len(numbers):
            values = np.stack([auc(parts[known[number]].mean(0), targets[number]) for number in numbers])
            found[name] = values, scenes[numbers]
    return found


def measure(
    model: SegmentationModel, dataset: Dataset | str, split: str = "val", queries: int = 100, example: int = 18
) -> dict[str, Any]:
    """Where a model attends on the first queries of a split; a query whose target covers all cells or none is left out.

    Args:
        model: a segmentation model.
        dataset: one with targets, or its name.
        split: of it.
        queries: how many.
        example: number of the one whose maps are stored.

    Returns:
        Means over queries, by row and measure a list over layers of [value, low, high] (95 % intervals over scenes).
    """
    found: list[QueryAttention] = []
    scenes: list[int] = []
    shown: dict[str, Any] = {}
    data = check_request(dataset, split, queries, 0)
    for number, scene in enumerate(scenes_of(data, split, queries, 0)):
        encoded, box = model.encode_image(scene.image), model.grid_box(*scene.image.shape[:2])
        for query in scene.queries:
            one = query_attention(model, encoded, query, box)
            if not one.target.any() or one.target.all():
                continue
            if len(found) == example:
                shown = example_of(one, query.text)
            found.append(one)
            scenes.append(number)
    first = next(iter(found), None)
    if first is None:
        raise InputError(f"{data.name}, split {split!r}: no query has a target that covers a part of the cells")
    about = {
        "model": model.name,
        "dataset": data.name,
        "split": split,
        "queries": len(found),
        "scenes": len(set(scenes)),
        "layers": first.weights["last"].shape[0],
        "heads": first.weights["last"].shape[1],
        "image_tokens": sorted({len(one.image) for one in found}),
        "target_tokens": round(float(np.mean([one.target.sum() for one in found])), 1),
        "environment": describe(model.decoder),
    }
    return about | {"rows": {row: summary(found, scenes, row) for row in ROWS}, "example": shown}


def summary(found: list[QueryAttention], scenes: list[int], row: str) -> dict[str, Any]:
    """All measures of one row of the prompts, over the queries."""
    values: dict[str, list[Numbers]] = defaultdict(list)
    for one in found:
        weights = one.weights[row].mean(1)
        measured = shares(weights, one.image) | spread(weights[:, one.image], one.target)
        for name, value in measured.items():
            values[name].append(value)
        values["heads"].append(auc(one.weights[row][..., one.image], one.target))
    heads = np.stack(values.pop("heads"))  # [Q, L, heads]
    best = heads.mean(0).argmax(-1)
    values["auc_best_head"] = list(np.take_along_axis(heads, best[None, :, None], 2)[..., 0])
    about: dict[str, Any] = {name: intervals(np.stack(each), scenes) for name, each in values.items()}
    if len({one.grid for one in found}) == 1:
        maps = np.stack([one.weights[row].mean(1)[:, one.image] for one in found])
        targets = np.stack([one.target for one in found])
        for name, (each, of) in controls(maps, targets, np.array(scenes)).items():
            about[name] = intervals(each, of.tolist())
    return about | {"auc_heads": np.round(heads.mean(0), 3).tolist(), "best_head": best.tolist()}


def intervals(values: Numbers, scenes: list[int]) -> list[list[float]]:
    """Means of values [Q, L] over queries: by layer [value, low, high]."""
    made = [mean_interval(values[:, layer].tolist(), scenes) for layer in range(values.shape[1])]
    return [[round(number, 3) for number in (one.value, one.low, one.high)] for one in made]


def example_of(one: QueryAttention, text: str) -> dict[str, Any]:
    """Maps of a query: by layer the mask query's attention on each cell, mean over heads, in percent of the most."""
    scores = one.weights["mask_query"].mean(1)[:, one.image][:, np.argsort(one.cells)]
    return {
        "query": text,
        "grid": list(one.grid),
        "target": np.sort(one.cells[one.target]).tolist(),
        "maps": (100 * scores / scores.max(1, keepdims=True)).round().astype(int).tolist(),
    }


def store(found: Mapping[str, Any], target: Path) -> None:
    """Write a measurement, a line for each list of numbers."""
    parts = {**found, "rows": {}, "example": {}}
    text = json.dumps(parts, indent=1).removesuffix('\n "rows": {},\n "example": {}\n}')
    rows = [f"  {json.dumps(row)}: {{\n{lines(measures, 3)}\n  }}" for row, measures in found["rows"].items()]
    text += '\n "rows": {\n' + ",\n".join(rows) + '\n },\n "example": {\n' + lines(found["example"], 2) + "\n }\n}\n"
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}")


def lines(values: Mapping[str, Any], indent: int) -> str:
    """The entries of a JSON object, one a line."""
    return ",\n".join(f"{' ' * indent}{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())


def draw(names: tuple[str, ...] = SHOWN, folder: Path = IMAGES) -> None:
    """Draw stored measurements side by side."""
    attention_drawing.write({name: read(name) for name in names}, folder)


def main() -> None:
    """Measure or draw."""
    parser = argparse.ArgumentParser("attention", None, __doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    measuring, drawing = parts.add_parser("measure"), parts.add_parser("draw")
    measuring.add_argument("model", help="as tokenprune.load takes it")
    measuring.add_argument("dataset")
    measuring.add_argument("--split", default="val")
    measuring.add_argument("--queries", type=int, default=100)
    measuring.add_argument("--example", type=int, default=18, help="number of the query whose maps are stored")
    measuring.add_argument("--name", help="of the file in docs/results; attention-MODEL by default")
    drawing.add_argument("names", nargs="*", default=SHOWN, help="files in docs/results, without .json")
    given = parser.parse_args()
    if given.what == "draw":
        return draw(tuple(given.names))
    found = measure(tp.load(given.model), given.dataset, given.split, given.queries, given.example)
    store(found, STORED / f"{given.name or f'attention-{Path(given.model).name}'}.json")


if __name__ == "__main__":
    main()
