"""Scenes of the `shapes` dataset: a textured noisy background and 5 to 10 coloured shapes. Everything here is ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 256
"""Height and width of every image, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 220, 50),
    "purple": (145, 55, 175),
    "orange": (244, 135, 30),
    "cyan": (55, 205, 215),
    "white": (242, 242, 242),
}
SIZES: dict[str, tuple[float, float]] = {"small": (12.0, 16.0), "large": (23.0, 30.0)}
"""Radius in pixels of the circle around a shape, lowest and highest."""

HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("green", "cross"),
        ("blue", "ring"),
        ("yellow", "triangle"),
        ("purple", "square"),
        ("orange", "hexagon"),
        ("cyan", "circle"),
        ("white", "diamond"),
    }
)
"""(colour, shape) pairs that occur in the split `heldout` only."""

MIN_VISIBLE = 0.6
"""Every object shows at least this share of its area."""

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y`: centroid of its visible pixels, in pixels from the left / top.

    `radius`: in pixels, before occlusion. `area`: visible pixels. `label`: the value of its
    pixels in the scene's label map.
    """

    label: int
    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    area: int


@dataclass(frozen=True, eq=False)
class DrawnScene:
    """`image`: uint8 [256, 256, 3]. `labels`: uint8 [256, 256], the label of the object seen there, 0 for none."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


def _regular(corners: int, turn: float, inner: float | None = None) -> list[tuple[float, float]]:
    points = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(points)]
    angles = [2 * math.pi * i / points + turn - math.pi / 2 for i in range(points)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_ARM = 0.34
_CROSS = [
    (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
    (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
]  # fmt: skip
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(x, y + 0.12) for x, y in _regular(3, 0.0)],
    "star": _regular(5, 0.0, 0.42),
    "cross": _CROSS,
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "hexagon": _regular(6, math.pi / 6),
}


def _coverage(shape: str, dx: float, dy: float, radius: float, turn: float, side: int) -> NDArray[np.float32]:
    """Antialiased coverage, float32 [side, side] in 0..1, of a shape centred at (side / 2 + dx, side / 2 + dy)."""
    scale = _SUPERSAMPLING
    canvas = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(canvas)
    cx, cy, r = (side / 2 + dx) * scale, (side / 2 + dy) * scale, radius * scale
    if shape in ("circle", "ring"):
        r *= 0.94
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape == "ring":
            hole = 0.52 * r
            pen.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    else:
        cos, sin = math.cos(turn), math.sin(turn)
        corners = [(cx + r * (cos * x - sin * y), cy + r * (sin * x + cos * y)) for x, y in _OUTLINES[shape]]
        pen.polygon(corners, fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255.0


def _noise(rng: np.random.Generator, cells: int, size: int = SIZE) -> NDArray[np.float32]:
    """Smooth noise, float32 [size, size, 3], about -1..1."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1.0


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    base = rng.uniform(55, 150) + rng.uniform(-14, 14, 3)
    texture = _noise(rng, int(rng.integers(3, 7))) * rng.uniform(8, 20)
    texture = texture + _noise(rng, int(rng.integers(12, 48))) * rng.uniform(4, 14)
    kind = rng.integers(3)
    if kind:  # stripes (1) or checks (2) in half of the contrast
        ramp = np.arange(SIZE, dtype=np.float32) * (2 * math.pi / rng.uniform(14, 60))
        waves = np.sin(ramp + rng.uniform(0, 6))
        pattern = waves[None, :] + (np.sin(ramp)[:, None] if kind == 2 else np.float32(rng.uniform(-1, 1)))
        texture = texture + pattern[:, :, None] * rng.uniform(2, 8)
    return np.asarray(base + texture, dtype=np.float32)


def _attributes(rng: np.random.Generator, count: int, held_out: bool) -> list[tuple[str, str, str]]:
    """(colour, shape, size) of every object; few colours and shapes a scene, so that objects share attributes."""
    names = list(COLOURS)
    if held_out:
        pairs = sorted(HELD_OUT)
        chosen = [pairs[i] for i in rng.choice(len(pairs), int(rng.integers(1, 4)), replace=False)]
        colours = sorted({c for c, _ in chosen} | {names[int(rng.integers(8))]})
        shapes = sorted({s for _, s in chosen} | {SHAPES[int(rng.integers(8))]})
    else:
        colours = [names[i] for i in rng.choice(8, int(rng.integers(2, 6)), replace=False)]
        shapes = [SHAPES[i] for i in rng.choice(8, int(rng.integers(2, 6)), replace=False)]
    allowed = [(c, s) for c in colours for s in shapes if held_out or (c, s) not in HELD_OUT]
    if not allowed:
        return _attributes(rng, count, held_out)
    result = []
    for i in range(count):
        pair = allowed[int(rng.integers(len(allowed)))]
        if held_out and i == 0:
            pair = chosen[0]
        result.append((*pair, "small" if rng.random() < 0.5 else "large"))
    return result


def _place(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]] | None:
    """Centres; most objects keep clear of each other, some may overlap an earlier one in part. None: no room."""
    centres: list[tuple[float, float]] = []
    for i, radius in enumerate(radii):
        closeness = 0.72 if rng.random() < 0.12 else 1.08
        for _ in range(60):
            x, y = rng.uniform(radius + 2, SIZE - radius - 2, 2)
            if all(math.hypot(x - u, y - v) > closeness * (radius + radii[j]) for j, (u, v) in enumerate(centres)):
                centres.append((float(x), float(y)))
                break
        else:
            if i < 5:
                return None
            break
    return centres


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> DrawnScene:
    """Draw one scene; with `held_out`, its first object at least has an attribute combination of `HELD_OUT`."""
    while True:
        attributes = _attributes(rng, int(rng.integers(5, 11)), held_out)
        radii = [float(rng.uniform(*SIZES[size])) for _, _, size in attributes]
        centres = _place(rng, radii)
        if centres is None:
            continue
        scene = _paint(rng, attributes, radii, centres)
        if scene is not None:
            return scene


def _paint(
    rng: np.random.Generator,
    attributes: list[tuple[str, str, str]],
    radii: list[float],
    centres: list[tuple[float, float]],
) -> DrawnScene | None:
    image = _background(rng)
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    full_areas = []
    grain = _noise(rng, 40)
    for i, (x, y) in enumerate(centres):
        colour, shape, _ = attributes[i]
        radius = radii[i]
        half = int(radius) + 3
        ix, iy = int(x), int(y)
        top, left = max(iy - half, 0), max(ix - half, 0)
        bottom, right = min(iy + half, SIZE), min(ix + half, SIZE)
        cover = _coverage(shape, x - ix, y - iy, radius, float(rng.uniform(-0.17, 0.17)), 2 * half)
        cover = cover[top - iy + half : bottom - iy + half, left - ix + half : right - ix + half]
        tint = np.asarray(COLOURS[colour], dtype=np.float32) * rng.uniform(0.88, 1.06) + rng.uniform(-9, 9, 3)
        window = (slice(top, bottom), slice(left, right))
        paint = tint + grain[window] * 12
        image[window] += cover[:, :, None] * (paint - image[window])
        solid = cover >= 0.5
        labels[window][solid] = i + 1
        full_areas.append(int(solid.sum()))
    areas = np.bincount(labels.ravel(), minlength=len(centres) + 1)[1:]
    if any(areas[i] < MIN_VISIBLE * full_areas[i] for i in range(len(centres))):
        return None
    speckle = rng.integers(-12, 13, (SIZE, SIZE), dtype=np.int8)
    pixels = np.clip(image + speckle[:, :, None], 0, 255).astype(np.uint8)
    rows, columns = np.nonzero(labels)
    values = labels[rows, columns].astype(np.int64)
    xs = np.bincount(values, columns, len(centres) + 1)[1:] / areas
    ys = np.bincount(values, rows, len(centres) + 1)[1:] / areas
    objects = tuple(
        SceneObject(i + 1, shape, colour, size, float(xs[i]), float(ys[i]), radii[i], int(areas[i]))
        for i, (colour, shape, size) in enumerate(attributes[: len(centres)])
    )
    return DrawnScene(pixels, labels, objects)
