"""The two phases before the decoder: SAM on point prompts to any object, and the tower on dense targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Recipe, Run, muon_and_adamw
from losses import half_size, mask_loss, tower_loss
from model import (
    CHANNELS,
    TowerHeads,
    build_sam,
    build_tower,
    decode_masks,
    point_prompts,
    sam_pixels,
    tower_features,
)
from scenes import batch


def canonical_point(label: np.ndarray, item: Any) -> tuple[float, float]:
    """The point that stands for an object: its visible centroid, or its own pixel nearest to that."""
    seen = label[int(item.y + 0.5), int(item.x + 0.5)]
    if seen in (0, item.label):
        return item.x, item.y
    rows, columns = np.nonzero(label == item.label)
    nearest = int(np.argmin((rows - item.y) ** 2 + (columns - item.x) ** 2))
    return float(columns[nearest]), float(rows[nearest])


def _points(
    rng: np.random.Generator, label: np.ndarray, objects: Any, count: int
) -> tuple[list[Any], list[np.ndarray]]:
    points, masks = [], []
    for item in (objects[i] for i in rng.integers(0, len(objects), count)):
        mask = label == item.label
        if rng.random() < 0.35:
            rows, columns = np.nonzero(mask)
            pick = int(rng.integers(len(rows)))
            points.append((columns[pick], rows[pick]))
        else:
            x, y = canonical_point(label, item)
            points.append((x + rng.normal(0, 2.0), y + rng.normal(0, 2.0)))
        masks.append(mask)
    return points, masks


def train_sam(recipe: Recipe, steps: int) -> None:
    """SAM learns the mask of the object at a point: class-agnostic by construction. Prompt noise makes it forgiving."""
    torch.manual_seed(recipe.seed)
    sam = build_sam()
    run = Run(recipe, "sam", steps, {"sam": sam}, muon_and_adamw([sam], 1.5e-3))
    size, count = 8, 4
    while not run.done:
        run.set_rate()
        rng = run.generator()
        images, labels, scenes = batch(run, size)
        chosen = [_points(rng, label, objects, count) for label, objects in zip(labels, scenes, strict=True)]
        points = torch.tensor(np.array([p for p, _ in chosen]), dtype=torch.float32)
        masks = torch.from_numpy(np.array([m for _, m in chosen])).flatten(0, 1)
        noise = torch.from_numpy(rng.normal(0, 0.05, (size, count, CHANNELS)).astype(np.float32))
        with recipe.precision():
            embedding = sam.vision_encoder(sam_pixels(torch.from_numpy(images))).last_hidden_state
            logits = decode_masks(sam, embedding, point_prompts(sam, points) + noise)
        loss, iou = mask_loss(logits.flatten(0, 1), half_size(masks), positive=1 + 15 * max(0.0, 0.6 - run.progress))
        loss.backward()
        run.update(sam.parameters())
        run.tick({"loss": loss.item(), "iou": iou.item()}, size)
        run.keep()


def train_tower(recipe: Recipe, steps: int) -> None:
    """The tower learns what covers each patch, so that the decoder starts from features that mean something."""
    torch.manual_seed(recipe.seed)
    tower, heads = build_tower(), TowerHeads()
    run = Run(recipe, "tower", steps, {"tower": tower, "heads": heads}, muon_and_adamw([tower, heads], 1.2e-3))
    size = 10
    while not run.done:
        run.set_rate(floor=0.15)
        images, labels, scenes = batch(run, size)
        with recipe.precision():
            outputs = heads(*tower_features(tower, torch.from_numpy(images)))
        loss, report = tower_loss(outputs, labels, scenes)
        loss.backward()
        run.update([*tower.parameters(), *heads.parameters()])
        run.tick({"loss": loss.item(), **report}, size)
        run.keep()
