"""Clothing Co-Parsing in small: 1004 photographs of 24 persons whose wardrobes are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.datasets.strips.photographs import GARMENTS

HEIGHT, WIDTH, SCALE = 80, 56, 4  # a strip shows them four times as large
RAW = {"bag": "purse", "dress": "dress", "jeans": "jeans", "jacket": "blazer", "hat": "hat", "glasses": "sunglasses"}
COLOURS = {"red": (190, 25, 35), "blue": (50, 80, 160), "black": (20, 20, 22), "white": (245, 245, 245)}
PERSONS = 24
LABELS = ["null", "skin", *sorted({name for merged in GARMENTS.values() for name in merged})]


def wardrobe(person: int) -> dict[str, str]:
    """The colour of each garment that a person wears."""
    rng = np.random.default_rng(person)
    return {name: str(rng.choice(list(COLOURS))) for name in RAW if rng.random() < 0.5}


def picture(person: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A photograph and its labels; the red of the background is ten times the person's number."""
    pixels = np.full((HEIGHT, WIDTH, 3), (10 * person, 200, 60), dtype=np.uint8)
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[4 : 76 - person, 12:44] = LABELS.index("skin")
    for place, (name, colour) in enumerate(wardrobe(person).items()):
        rows = slice(5 + 8 * place, 12 + 8 * place)
        pixels[rows, 14:40], labels[rows, 14:40] = COLOURS[colour], LABELS.index(RAW[name])
    return pixels, labels


def shown(strip: NDArray[np.uint8]) -> list[int]:
    """The persons of a strip, by its background."""
    return [round(int(red) / 10) for red in strip[4, WIDTH * SCALE // 16 :: WIDTH * SCALE, 0]]


def write(root: Path) -> Path:
    """Write the folder, and give it back."""
    files = []
    for person in range(PERSONS):
        photo, labels = io.BytesIO(), io.BytesIO()
        pixels, numbers = picture(person)
        Image.fromarray(pixels).save(photo, "JPEG", quality=95, subsampling=0)
        Image.fromarray(numbers).save(labels, "PNG")
        files.append((photo.getvalue(), labels.getvalue()))
    for folder in ("photos", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 1005):
        photo_bytes, label_bytes = files[number % PERSONS]
        (root / "photos" / f"{number:04d}.jpg").write_bytes(photo_bytes)
        (root / "labels" / f"{number:04d}.png").write_bytes(label_bytes)
    (root / "labels.json").write_text(json.dumps(LABELS))
    return root
