"""`shapes`: a procedural dataset for reasoning segmentation."""

from __future__ import annotations

from tokenprune.datasets.shapes.dataset import Shapes, Shapes2, UnknownSplitError, draw
from tokenprune.datasets.shapes.queries import KINDS
from tokenprune.datasets.shapes.scenes import COLOURS, HELD_OUT, SHAPES, SIZES, DrawnScene, SceneObject

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "KINDS",
    "SHAPES",
    "SIZES",
    "DrawnScene",
    "SceneObject",
    "Shapes",
    "Shapes2",
    "UnknownSplitError",
    "draw",
]
