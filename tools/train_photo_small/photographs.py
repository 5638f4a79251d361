"""Street photographs with their garments in everyday words: Clothing Co-Parsing (Yang et al., CVPR 2014)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 320, 224  # of one photograph in a strip

GARMENTS = {
    "bag": ("bag", "purse", "wallet"),
    "belt": ("belt",),
    "jacket": ("blazer", "jacket"),
    "coat": ("coat", "cape"),
    "top": ("blouse", "bodysuit", "shirt", "t-shirt", "top"),
    "sweater": ("cardigan", "hoodie", "jumper", "sweater", "sweatshirt"),
    "dress": ("dress",),
    "romper": ("romper",),
    "skirt": ("skirt",),
    "shorts": ("shorts",),
    "trousers": ("pants",),
    "jeans": ("jeans",),
    "tights": ("leggings", "stockings", "tights"),
    "boots": ("boots",),
    "shoes": ("clogs", "flats", "heels", "loafers", "pumps", "sandals", "shoes", "sneakers", "wedges"),
    "socks": ("socks",),
    "hat": ("hat",),
    "glasses": ("glasses", "sunglasses"),
    "scarf": ("scarf",),
    "vest": ("vest",),
    "suit": ("suit",),
    "tie": ("tie",),
    "gloves": ("gloves",),
}
"""The data set's 59 names, merged where photographs this small do not tell them apart; the others are not asked for."""

NAMES = tuple(GARMENTS)
SMALL = {"belt", "socks", "glasses", "tie", "gloves"}

COLOURS = {
    "black": [(20, 20, 22), (45, 45, 48)],
    "white": [(245, 245, 245), (220, 220, 222)],
    "gray": [(128, 128, 130), (95, 96, 100), (165, 165, 168)],
    "red": [(190, 25, 35), (140, 20, 30), (220, 60, 60)],
    "orange": [(235, 120, 40), (220, 100, 30)],
    "yellow": [(235, 205, 60), (220, 190, 40)],
    "green": [(60, 130, 70), (40, 80, 50), (110, 160, 90), (90, 100, 50)],
    "blue": [(50, 80, 160), (30, 40, 90), (110, 150, 200), (80, 110, 150)],
    "purple": [(110, 60, 140), (80, 40, 90)],
    "pink": [(235, 150, 170), (220, 90, 140), (240, 190, 195)],
    "brown": [(100, 65, 45), (70, 45, 35), (140, 95, 65)],
    "beige": [(215, 195, 165), (190, 165, 130)],
}
"""Examples of each colour word, sRGB (ours)."""


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB values 0..255 [..., 3]."""
    c = rgb.astype(np.float32) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = c @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]], np.float32)
    f = np.cbrt(np.maximum(xyz / np.array([0.9505, 1.0, 1.089], np.float32), 1e-6))
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_WORDS = [word for word, examples in COLOURS.items() for _ in examples]
_EXAMPLES = to_lab(np.array([example for examples in COLOURS.values() for example in examples]))


def colour_shares(pixels: np.ndarray) -> dict[str, float]:
    """Which share of the pixels [n, 3] each colour word is nearest to."""
    lab = to_lab(pixels)
    nearest = ((lab[:, None] - _EXAMPLES) ** 2).sum(-1).argmin(-1)
    counts = np.bincount(nearest, minlength=len(_WORDS)) / len(pixels)
    shares: dict[str, float] = {}
    for word, share in zip(_WORDS, counts, strict=True):
        shares[word] = shares.get(word, 0.0) + float(share)
    return shares


@dataclass(frozen=True)
class View:
    """One photograph as a strip shows it.

    Args:
        number: of the photograph.
        pixels: uint8 [HEIGHT, WIDTH, 3].
        labels: uint8 [HEIGHT, WIDTH]: 0 background, 1 + index into NAMES for a garment, 255 for the rest of the person.
        colours: by garment, the share of each colour word in the untouched photograph.
    """

    number: int
    pixels: np.ndarray
    labels: np.ndarray
    colours: dict[str, dict[str, float]]

    @cached_property
    def pixels_of(self) -> dict[str, int]:
        """How many pixels of each garment are seen."""
        counts = np.bincount(self.labels.ravel(), minlength=256)
        return {name: int(counts[number + 1]) for number, name in enumerate(NAMES)}

    def wears(self, garment: str) -> bool | None:
        """Whether the person wears it; None where too little of it is seen to say."""
        seen = self.pixels_of[garment]
        if seen == 0:
            return False
        return True if seen >= (60 if garment in SMALL else 180) else None

    def wears_in(self, colour: str, garment: str) -> bool | None:
        """Whether the person wears one of that colour: most of it is, or hardly any."""
        wears = self.wears(garment)
        if not wears:
            return wears
        share = self.colours.get(garment, {}).get(colour, 0.0)
        return True if share >= 0.5 else False if share < 0.12 else None

    def colour_of(self, garment: str) -> str | None:
        """The colour that most of a garment has."""
        found = [word for word, share in self.colours.get(garment, {}).items() if share >= 0.5]
        return found[0] if found else None


class Photographs:
    """The 1004 photographs, in three parts that a seed fixes.

    Args:
        folder: `photos`, `labels` and `labels.json`.
        facts: a JSON file that keeps the garments' colours, written where it is not there.
    """

    def __init__(self, folder: Path, facts: Path) -> None:
        self.folder = folder
        raw = json.loads((folder / "labels.json").read_text())
        table = np.full(256, 255, dtype=np.uint8)
        table[0] = 0
        for number, merged in enumerate(GARMENTS.values()):
            for name in merged:
                table[raw.index(name)] = number + 1
        self._table = table
        self.numbers = sorted(int(path.stem) for path in (folder / "photos").glob("*.jpg"))
        if facts.exists():
            self.colours = {int(key): value for key, value in json.loads(facts.read_text()).items()}
        else:
            self.colours = {number: self._colours(number) for number in self.numbers}
            facts.write_text(json.dumps(self.colours))
        order = np.random.default_rng(20261201).permutation(self.numbers).tolist()
        self.split = {"test": order[:200], "val": order[200:280], "train": order[280:]}

    def read(self, number: int) -> tuple[Image.Image, Image.Image]:
        """A photograph and its labels (our numbers) in their original size."""
        name = f"{number:04d}"
        labels = self._table[np.array(Image.open(self.folder / "labels" / f"{name}.png"))]
        return Image.open(self.folder / "photos" / f"{name}.jpg").convert("RGB"), Image.fromarray(labels)

    def _colours(self, number: int) -> dict[str, dict[str, float]]:
        photo, labels = (np.array(part) for part in self.read(number))
        found = {}
        for index, name in enumerate(NAMES):
            pixels = photo[labels == index + 1]
            if len(pixels) >= 20:
                shares = colour_shares(pixels[:: max(len(pixels) // 600, 1)])
                found[name] = {word: round(share, 3) for word, share in shares.items() if share > 0.02}
        return found

    def view(self, number: int, rng: np.random.Generator | None = None) -> View:
        """The photograph cut to the strip's shape around its middle; with `rng` flipped, cut and tinted by chance."""
        photo, labels = self.read(number)
        box = _box(photo.size, rng)
        pixels = photo.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box)
        seen = np.array(labels.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST, box))
        values = np.array(pixels)
        if rng is not None:
            if rng.random() < 0.5:
                values, seen = values[:, ::-1], seen[:, ::-1]
            values = _tinted(values, rng)
        return View(number, np.ascontiguousarray(values), np.ascontiguousarray(seen), self.colours[number])


def _box(size: tuple[int, int], rng: np.random.Generator | None) -> tuple[float, float, float, float]:
    """The part of a photograph to show, (left, top, right, bottom)."""
    width, height = size
    shape = WIDTH / HEIGHT
    zoom, x, y = 1.0, 0.5, 0.5
    if rng is not None:
        zoom, x, y = rng.uniform(0.85, 1.0), rng.uniform(), rng.uniform()
        shape *= float(np.exp(rng.uniform(-0.12, 0.12)))
    w = zoom * min(width, height * shape)
    h = w / shape
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h


def _tinted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and white balance changed so little that colour words stay true."""
    x = pixels.astype(np.float32) / 255
    x = x ** float(np.exp(rng.uniform(-0.25, 0.25)))
    gray = x.mean(-1, keepdims=True)
    x = gray + rng.uniform(0.75, 1.25) * (x - gray)
    x = x.mean() + rng.uniform(0.8, 1.2) * (x - x.mean())
    x = x * rng.uniform(0.93, 1.07, 3).astype(np.float32)
    if rng.random() < 0.3:
        x = x + rng.normal(0, 0.02, x.shape).astype(np.float32)
    return (x.clip(0, 1) * 255).astype(np.uint8)
