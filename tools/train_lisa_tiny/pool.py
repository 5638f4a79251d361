"""The training pool: scenes of the split `train`, drawn once by all cores into memory-mapped files."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tokenprune.datasets.shapes.dataset import scene_generator
from tokenprune.datasets.shapes.scenes import SIZE, SceneObject, draw_scene


def _fill(task: tuple[Path, str, int, int, int]) -> list[list[dict[str, object]]]:
    folder, split, _count, start, stop = task
    images = np.lib.format.open_memmap(folder / f"{split}-images.npy", mode="r+")
    labels = np.lib.format.open_memmap(folder / f"{split}-labels.npy", mode="r+")
    objects = []
    for index in range(start, stop):
        scene = draw_scene(scene_generator(split, 0, index), held_out=split == "heldout")
        images[index], labels[index] = scene.image, scene.labels
        objects.append([asdict(item) for item in scene.objects])
    return objects


def make_pool(folder: Path, split: str, count: int, workers: int = 2) -> None:
    """Draw `count` scenes of `split` into `folder`, unless they are there already."""
    done = folder / f"{split}-objects.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in (("images", (count, SIZE, SIZE, 3)), ("labels", (count, SIZE, SIZE))):
        np.lib.format.open_memmap(folder / f"{split}-{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
    step = 250
    tasks = [(folder, split, count, i, min(i + step, count)) for i in range(0, count, step)]
    with multiprocessing.Pool(workers) as pool:
        objects = [scene for part in pool.imap(_fill, tasks) for scene in part]
    done.write_text(json.dumps(objects))


class Pool:
    """`images` uint8 [n, H, W, 3], `labels` uint8 [n, H, W], `objects`: the objects of every scene."""

    def __init__(self, folder: Path, split: str) -> None:
        self.images = np.load(folder / f"{split}-images.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{split}-labels.npy", mmap_mode="r")
        records = json.loads((folder / f"{split}-objects.json").read_text())
        self.objects = [tuple(SceneObject(**item) for item in scene) for scene in records]

    def __len__(self) -> int:
        return len(self.objects)
