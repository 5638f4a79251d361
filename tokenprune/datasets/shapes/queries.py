"""Which forms of queries each version of the dataset has, and how a query is drawn. Ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tokenprune.datasets.shapes.forms import attribute, comparison, exclusion, extreme, knowledge, order, unshared
from tokenprune.datasets.shapes.phrases import Candidate
from tokenprune.datasets.shapes.relations import closest, nearest, outermost_side, side
from tokenprune.datasets.shapes.scenes import SceneObject

KINDS = ("attribute", "extreme", "relation", "reasoning")

Form = Callable[[Sequence[SceneObject]], list[Any]]
"""The queries of one form that a scene allows, as `Candidate`s in lists that can be nested."""

VERSIONS: Mapping[int, Mapping[str, tuple[Form, ...]]] = {
    1: {
        "attribute": (attribute,),
        "extreme": (extreme,),
        "relation": (outermost_side, outermost_side, nearest),
        "reasoning": (exclusion, exclusion, comparison, comparison, knowledge, unshared, order),
    },
    2: {
        "attribute": (attribute,),
        "extreme": (extreme,),
        "relation": (closest, side),
        "reasoning": (exclusion, comparison, knowledge, unshared, order),
    },
}
"""The forms of each kind, by version: a form is drawn first, then a query of it (a form listed twice counts twice)."""


def forms(version: int) -> dict[str, Form]:
    """The forms of a version by name, in the order of the kinds."""
    return {form.__name__: form for of_kind in VERSIONS[version].values() for form in of_kind}


def sample_queries(
    rng: np.random.Generator, objects: Sequence[SceneObject], kind: str, count: int = 1, version: int = 1
) -> list[Candidate]:
    """Draw up to `count` different queries of one kind; fewer where the scene allows fewer."""
    of_kind = VERSIONS[version][kind]
    allowed = {form: form(objects) for form in dict.fromkeys(of_kind)}
    return sample(rng, [allowed[form] for form in of_kind if allowed[form]], count)


def sample(rng: np.random.Generator, queries: Any, count: int) -> list[Candidate]:
    """Draw up to `count` different queries of nested lists: in each list one entry, all equally likely."""
    drawn: dict[str, SceneObject] = {}
    for _ in range(4 * count):
        if not queries or len(drawn) == count:
            break
        entry = queries
        while isinstance(entry, list):
            entry = entry[int(rng.integers(len(entry)))]
        drawn.setdefault(*entry)
    return list(drawn.items())
