"""The two phases before the decoder: SAM on point prompts to any object, and the tower on dense targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Run, muon_and_adamw
from losses import half_size, mask_loss, tower_loss
from model import (
    CHANNELS,
    IMAGE_SIZE,
    TowerHeads,
    build_sam,
    build_tower,
    decode_masks,
    point_prompts,
    sam_pixels,
    tower_features,
)
from pool import Pool


def batch(pool: Pool, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Images uint8 [B, 256, 256, 3], labels uint8 [B, 256, 256], objects; half of them mirrored left to right."""
    images, labels, scenes = [], [], []
    for index in rng.integers(0, len(pool), size):
        image, label, objects = pool.images[index], pool.labels[index], pool.objects[index]
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
            objects = tuple(replace(item, x=IMAGE_SIZE - 1 - item.x) for item in objects)
        images.append(image)
        labels.append(label)
        scenes.append(objects)
    return np.stack(images), np.stack(labels), scenes


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


def train_sam(folder: Path, pool: Pool, seconds: float, seed: int = 0) -> None:
    """SAM learns the mask of the object at a point: class-agnostic by construction. Prompt noise makes it forgiving."""
    torch.manual_seed(seed)
    sam = build_sam()
    run = Run(folder, "sam", seconds, {"sam": sam}, muon_and_adamw([sam], 1.5e-3))
    rng = np.random.default_rng([seed, 1, run.step])
    size, count = 8, 4
    while not run.done:
        run.set_rate()
        images, labels, scenes = batch(pool, rng, size)
        chosen = [_points(rng, label, objects, count) for label, objects in zip(labels, scenes, strict=True)]
        points = torch.tensor(np.array([p for p, _ in chosen]), dtype=torch.float32)
        masks = torch.from_numpy(np.array([m for _, m in chosen])).flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            embedding = sam.vision_encoder(sam_pixels(torch.from_numpy(images))).last_hidden_state
            prompts = point_prompts(sam, points)
            prompts = prompts + 0.05 * torch.randn(size, count, CHANNELS)
            logits = decode_masks(sam, embedding, prompts)
        loss, iou = mask_loss(logits.flatten(0, 1), half_size(masks), positive=1 + 15 * max(0.0, 0.6 - run.progress))
        loss.backward()
        run.update(sam.parameters())
        run.tick({"loss": loss.item(), "iou": iou.item()}, size)


def train_tower(folder: Path, pool: Pool, seconds: float, seed: int = 0) -> None:
    """The tower learns what covers each patch, so that the decoder starts from features that mean something."""
    torch.manual_seed(seed)
    tower, heads = build_tower(), TowerHeads()
    run = Run(folder, "tower", seconds, {"tower": tower, "heads": heads}, muon_and_adamw([tower, heads], 1.2e-3))
    rng = np.random.default_rng([seed, 2, run.step])
    size = 10
    while not run.done:
        run.set_rate(floor=0.15)
        images, labels, scenes = batch(pool, rng, size)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = heads(*tower_features(tower, torch.from_numpy(images)))
        loss, report = tower_loss(outputs, labels, scenes)
        loss.backward()
        run.update([*tower.parameters(), *heads.parameters()])
        run.tick({"loss": loss.item(), **report}, size)
