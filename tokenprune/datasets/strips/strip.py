"""Strips of photographs side by side, and what is asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenprune.datasets.strips.photographs import AGAIN, WIDTH, Photographs, View
from tokenprune.datasets.strips.queries import PersonQuery, draw
from tokenprune.errors import InputError

ATTEMPTS = 30  # strips without a query, which are rare, before labels are taken to be empty


@dataclass(frozen=True)
class Strip:
    """Photographs side by side, with queries.

    Args:
        views: the photographs, from left to right.
        queries: each true for exactly one person; at least one.
    """

    views: Sequence[View]
    queries: Sequence[PersonQuery]

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [HEIGHT, n · WIDTH, 3]."""
        return np.concatenate([view.pixels for view in self.views], 1)

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """uint8 [HEIGHT, n · WIDTH], see `View`."""
        return np.concatenate([view.labels for view in self.views], 1)

    def person(self, place: int) -> NDArray[np.bool_]:
        """bool [HEIGHT, n · WIDTH]: the person of a photograph, with all that is worn."""
        mask = np.zeros(self.labels.shape, dtype=np.bool_)
        columns = slice(place * WIDTH, (place + 1) * WIDTH)
        mask[:, columns] = self.labels[:, columns] > 0
        return mask


class Strips:
    """Draws strips.

    Args:
        photographs: of one split. Only what is not for training may have words that are never trained.
        persons: photographs in a strip.
    """

    def __init__(self, photographs: Photographs, persons: int = 4) -> None:
        self.photographs, self.persons = photographs, persons

    def draw(self, rng: np.random.Generator, count: int, varied: bool = False) -> Strip:
        """A strip.

        Args:
            rng: draws photographs, their variation and the queries.
            count: how many queries at most.
            varied: flip, cut and tint the photographs by chance; else they are shown as they are.

        Raises:
            InputError: a file cannot be read, see `Photographs.read`, or there is nothing to ask.
        """
        for _ in range(ATTEMPTS):
            numbers = rng.choice(self.photographs.numbers, self.persons, replace=False)
            views = [self.photographs.view(int(number), rng if varied else None) for number in numbers]
            queries = draw(rng, views, count, test=self.photographs.split != "train")
            if queries:
                return Strip(views, queries)
        found = f"{ATTEMPTS} strips of split {self.photographs.split!r}"
        raise InputError(f"{str(self.photographs.folder)!r}: nothing tells the persons of {found} apart; {AGAIN}")
