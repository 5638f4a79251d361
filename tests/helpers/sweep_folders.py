"""Folders of images and queries that sweeps run on, and what must be equal to a fresh sweep on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import dataset_files
import numpy as np
from PIL import Image

import tokenprune as tp


def folder_of(root: Path, queries: dict[str, list[str]]) -> Path:
    """A folder dataset: queries by image; every image and every mask is another."""
    root.mkdir(exist_ok=True)
    rows = [["image", "mask", "query"]]
    for number, (image, texts) in enumerate(queries.items()):
        path = root / image
        if not path.exists():
            pixels = np.full((20, 24, 3), 40 + sum(map(ord, image)) % 150, dtype=np.uint8)
            pixels[:, : 4 + number] = 255
            Image.fromarray(pixels).save(path)
        for place, text in enumerate(texts):
            name = f"{path.stem}-{place}.mask.png"
            if not (root / name).exists():
                Image.fromarray(dataset_files.filled((place, 0, place + 6, 9), width=24, height=20)).save(root / name)
            rows.append([image, name, text])
    with (root / "queries.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


START = {"a.png": ["red", "a blue one"], "b.png": ["green", "the left"], "c.png": ["the dog"]}


def config_of(data: Path, **more: Any) -> dict[str, Any]:
    entry = {"name": "folder", "path": str(data), **more.pop("entry", {})}
    return {"models": "fake", "datasets": entry, "strategies": ["whole", "front"], "budgets": 0.5, **more}


def samples(run: Path) -> Any:
    """What must be that of a fresh sweep."""
    table = tp.read_results(run)
    table = table[["label", "scene", "query", "text", "scene_name", "intersection", "union", "iou"]]
    return table.sort_values(["label", "scene", "query"]).values.tolist()
