"""Training scenes of the split `train` and their queries: drawn when they are needed, none of them twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from common import Run

from tokenprune.datasets.shapes.dataset import scene_generator
from tokenprune.datasets.shapes.forms import unshared
from tokenprune.datasets.shapes.phrases import describe, unique_names
from tokenprune.datasets.shapes.queries import VERSIONS, forms, sample
from tokenprune.datasets.shapes.scenes import DrawnScene, SceneObject, draw_scene

VERSION = 2
FORMS = forms(VERSION)
KIND_OF = {form.__name__: kind for kind, of_kind in VERSIONS[VERSION].items() for form in of_kind}
PHASE_SCENES = 10_000_000  # room for the scenes of one phase
STEP_SCENES = 16  # room for the scenes of one step
PHASES = ("sam", "tower", "decoder", "masks")

Objects = Sequence[SceneObject]


def batch(run: Run, size: int) -> tuple[np.ndarray, np.ndarray, list[tuple[SceneObject, ...]]]:
    """Images uint8 [B, 256, 256, 3], labels uint8 [B, 256, 256] and objects for the run's next step.

    Every other scene has an object that alone has its colour or shape; only half of the scenes have one otherwise.
    """
    first = PHASES.index(run.name) * PHASE_SCENES + run.step * STEP_SCENES
    scenes = [_scene(run.recipe.seed, first + i, particular=i % 2 == 0) for i in range(size)]
    return (
        np.stack([scene.image for scene in scenes]),
        np.stack([scene.labels for scene in scenes]),
        [scene.objects for scene in scenes],
    )


def _scene(seed: int, index: int, particular: bool) -> DrawnScene:
    rng = scene_generator("train", seed, index)
    scene = draw_scene(rng)
    while particular and not unshared(scene.objects):
        scene = draw_scene(rng)
    return scene


def draw_queries(
    rng: np.random.Generator, scenes: Sequence[Objects], count: int, weights: Sequence[float]
) -> tuple[list[list[str]], list[list[SceneObject]], list[list[str]]]:
    """For every scene `count` queries: texts, the objects they mean, forms; forms drawn by `weights`.

    Where a scene has too few of a form, others are drawn, and at last some twice.
    """
    texts, targets, names = [], [], []
    for objects in scenes:
        allowed = {form: make(objects) for form, make in FORMS.items()}
        drawn: dict[str, tuple[SceneObject, str]] = {}
        for _ in range(3):
            wanted = rng.multinomial(count - len(drawn), weights)
            for form, number in zip(FORMS, wanted, strict=True):
                drawn.update({text: (item, form) for text, item in sample(rng, allowed[form], int(number))})
        row = [(text, item, form) for text, (item, form) in drawn.items()]
        row += [row[int(i)] for i in rng.integers(0, len(row), count - len(row))]
        texts.append([text for text, _, _ in row])
        targets.append([item for _, item, _ in row])
        names.append([form for _, _, form in row])
    return texts, targets, names


def anchor_of(text: str, objects: Objects) -> SceneObject | None:
    """The anchor of a relation's query, None for a query of another kind."""
    words, _, name = text.rpartition(" the ")
    if not words.endswith((" closest to", " left of", " right of", " above", " below")):
        return None
    return next(item for described, item in unique_names(objects) if describe(described) == name)
