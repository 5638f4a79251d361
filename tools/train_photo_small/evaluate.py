"""gIoU and cIoU of held-out queries, with the controls: a wrong picture for the decoder, and the right point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from head import Eyes
from losses import pooled
from model import PhotoModel
from scenes import Asked, Natural, Scene, Strips
from torch import Tensor

from tokenprune_adapters.photos.parts import best_points, gather_cells


def fixed_scenes(strips: Strips, seed: int, scenes: int, queries: int) -> list[Callable[[], Scene]]:
    """Scenes that a seed fixes, made when asked for."""

    def make(number: int) -> Callable[[], Scene]:
        return lambda: strips.scene(np.random.default_rng([seed, number]), queries, False)

    return [make(number) for number in range(scenes)]


def natural_scenes(natural: Natural) -> list[Callable[[], Scene]]:
    """Every picture with anything to ask, with all its queries."""

    def make(number: int) -> Callable[[], Scene]:
        return lambda: natural.scene(np.random.default_rng(number), 50, False, number)

    return [make(number) for number in natural.numbers]


class Tally:
    """Counts of one condition."""

    def __init__(self) -> None:
        self.ious: list[float] = []
        self.hits: list[bool] = []
        self.asked: list[Asked] = []
        self.inter = self.union = 0

    def add(self, masks: Tensor, points: Tensor, asked: Sequence[Asked]) -> None:
        """Masks bool [n, H, W] of points (x, y) in 0..1 for queries."""
        for mask, point, one in zip(masks.numpy(), points.tolist(), asked, strict=True):
            height, width = one.target.shape
            inter, union = int((mask & one.target).sum()), int((mask | one.target).sum())
            self.inter, self.union = self.inter + inter, self.union + union
            self.ious.append(inter / max(union, 1))
            row, column = min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)
            self.hits.append(bool(one.target[row, column]))
            self.asked.append(one)

    def summary(self, kinds: bool) -> dict[str, Any]:
        """gIoU, cIoU, the share of points on the right thing, and with `kinds` gIoU by kind and for unseen words."""
        found: dict[str, Any] = {
            "giou": round(float(np.mean(self.ious)), 4),
            "ciou": round(self.inter / max(self.union, 1), 4),
            "hits": round(float(np.mean(self.hits)), 4),
            "n": len(self.ious),
        }
        if kinds:
            groups = {one.kind for one in self.asked}
            for name, belongs in [
                *((kind, [one.kind == kind for one in self.asked]) for kind in sorted(groups)),
                ("unseen", [one.unseen for one in self.asked]),
                ("seen", [not one.unseen for one in self.asked]),
            ]:
                if any(belongs):
                    values = np.array(self.ious)[np.array(belongs)]
                    found[name] = [round(float(values.mean()), 3), len(values)]
        return found


@torch.no_grad()
def evaluate(
    eyes: Eyes,
    model: PhotoModel,
    scenes: Sequence[Callable[[], Scene]],
    depth: int,
    conditions: Sequence[str] = ("full", "wrong", "oracle"),
    kinds: bool = False,
    pool: int = 1,
) -> dict[str, Any]:
    """A summary for each condition.

    Args:
        eyes, model: what is evaluated.
        scenes: see `fixed_scenes`.
        depth: after how many layers to read.
        conditions: "full"; "wrong": the decoder is shown the previous scene of the same grid, the head the right one;
            "oracle": the head is given the middle of the right thing; "blind": image tokens without the picture.
        kinds: also by kind of query.
        pool: see `losses.query_loss`.
    """
    model.eval()
    tallies = {condition: Tally() for condition in conditions}
    blind = model.blind
    earlier: dict[tuple[int, int], Tensor] = {}
    for make in scenes:
        scene = make()
        if not scene.asked:
            continue
        levels = eyes.levels(scene.pixels)
        cells = gather_cells(levels)
        for condition, tally in tallies.items():
            if condition == "oracle":
                points = torch.stack([_middle(one.target) for one in scene.asked])
            else:
                shown = cells
                if condition == "wrong":
                    if scene.grid not in earlier:
                        continue
                    shown = earlier[scene.grid]
                model.blind = blind or condition == "blind"
                points = answer_points(model, shown, [one.text for one in scene.asked], scene.grid, depth, pool)
                model.blind = blind
            tally.add(eyes.masks(levels, points) > 0, points, scene.asked)
        earlier[scene.grid] = cells
    model.train()
    return {condition: tally.summary(kinds) for condition, tally in tallies.items() if tally.ious}


def answer_points(
    model: PhotoModel, cells: Tensor, texts: Sequence[str], grid: tuple[int, int], depth: int, pool: int = 1
) -> Tensor:
    """The points [n, 2] that the model answers queries with."""
    tokens, _ = pooled(model.image_tokens(cells), grid, pool)
    states, _ = model.read(tokens, texts, [depth])[depth]
    return best_points(model.taps[str(depth)].read(states, *grid), *grid)


def _middle(mask: np.ndarray) -> Tensor:
    """The point of a mask that is nearest to its mean place."""
    places = np.argwhere(mask)
    row, column = places[((places - places.mean(0)) ** 2).sum(1).argmin()]
    return torch.tensor([(column + 0.5) / mask.shape[1], (row + 0.5) / mask.shape[0]])
