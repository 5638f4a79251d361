"""Queries that are true for exactly one person of a strip."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenprune.datasets.strips.photographs import NAMES, View

PLURAL = {"shorts", "trousers", "jeans", "tights", "boots", "shoes", "socks", "glasses", "gloves"}
KINDS = ("garment", "colour", "two", "without")
WEIGHTS = (0.25, 0.42, 0.23, 0.10)

WORDINGS = (
    "the person wearing {}",
    "the one with {}",
    "who is wearing {}?",
    "which of them has {} on?",
    "find the person in {}",
    "the person in {}",
    "someone is dressed in {}, who?",
    "{}",
    "somebody in {}",
    "please show me who wears {}",
)
UNSEEN_WORDINGS = ("point out whoever has {} on", "I am looking for somebody with {}", "mark the figure wearing {}")
WITHOUT = (
    "the person without {}",
    "the one who has no {}",
    "who is not wearing {}?",
    "everybody but one wears {}: which one does not?",
)
UNSEEN_WITHOUT = ("point out whoever lacks {}", "the only one wearing no {}")


Option = tuple[str, int, tuple[str, ...], bool]
"""What can be asked: its phrase, the person, the garments worn that it names, and whether its pair is kept out."""


@dataclass(frozen=True)
class PersonQuery:
    """A query about a strip.

    Args:
        text: the query.
        person: place in the strip of the person that it is true for.
        garments: those it names that the person wears, whose cells a pointer is taught.
        kind: one of KINDS.
        unseen: whether its wording or its pair of colour and garment is never trained.
        is_sentence: whether it is a sentence of its own; else a phrase for the person.
    """

    text: str
    person: int
    garments: tuple[str, ...]
    kind: str
    unseen: bool
    is_sentence: bool


def kept_out(colour: str, garment: str) -> bool:
    """Whether a pair of colour and garment is kept for the test (about one in six)."""
    return zlib.crc32(f"photo-small {colour} {garment}".encode()) % 6 == 0


def phrase(garment: str, colour: str | None = None) -> str:
    """The garment with its article."""
    words = f"{colour} {garment}" if colour else garment
    if garment in PLURAL:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def only_one(answers: Sequence[bool | None]) -> int | None:
    """The one who is True where all the others are False."""
    return answers.index(True) if list(answers).count(True) == 1 and None not in answers else None


def all_queries(views: Sequence[View], unseen_pairs: bool) -> dict[str, list[Option]]:
    """Everything that is true for exactly one person, by kind.

    Args:
        views: the strip's persons.
        unseen_pairs: whether pairs of colour and garment that are kept out may be used.
    """
    found: dict[str, list[Option]] = {kind: [] for kind in KINDS}
    worn = {name: [view.wears(name) for view in views] for name in NAMES}
    for name, answers in worn.items():
        person = only_one(answers)
        if person is not None:
            found["garment"].append((phrase(name), person, (name,), False))
        without = only_one([None if answer is None else not answer for answer in answers])
        if without is not None and name != "shoes":
            found["without"].append((phrase(name), without, (), False))
    for person, view in enumerate(views):
        wears = [name for name in NAMES if view.wears(name)]
        pairs = []
        for name in wears:
            colour = view.colour_of(name)
            if colour is None or (kept_out(colour, name) and not unseen_pairs):
                continue
            pairs.append((colour, name))
            if only_one([other.wears_in(colour, name) for other in views]) == person:
                found["colour"].append((phrase(name, colour), person, (name,), kept_out(colour, name)))
        for colour, first in pairs:
            for second in wears:
                if second == first:
                    continue
                both = [_both(other.wears_in(colour, first), other.wears(second)) for other in views]
                if only_one(both) == person:
                    text = f"{phrase(first, colour)} and {phrase(second)}"
                    found["two"].append((text, person, (first, second), kept_out(colour, first)))
    return found


def _both(first: bool | None, second: bool | None) -> bool | None:
    if first is False or second is False:
        return False
    return None if first is None or second is None else True


def draw(rng: np.random.Generator, views: Sequence[View], count: int, test: bool = False) -> list[PersonQuery]:
    """Up to `count` different queries about a strip, of kinds by WEIGHTS, each person asked for about as often.

    Args:
        rng: of the drawing.
        views: the strip's persons.
        count: how many at most.
        test: whether wordings and pairs that are never trained may be used.
    """
    options = all_queries(views, test)
    asked: list[PersonQuery] = []
    used = np.zeros(len(views))
    said = set()
    for _ in range(3 * count):
        if len(asked) == count:
            break
        kind = str(rng.choice(KINDS, p=WEIGHTS))
        left = [option for option in options[kind] if (kind, option[0]) not in said]
        if not left:
            continue
        weights = np.array([4.0 ** -used[person] for _, person, _, _ in left])
        text, person, garments, pair = left[int(rng.choice(len(left), p=weights / weights.sum()))]
        said.add((kind, text))
        used[person] += 1
        unseen = test and rng.random() < 0.3
        seen_list, unseen_list = (WITHOUT, UNSEEN_WITHOUT) if kind == "without" else (WORDINGS, UNSEEN_WORDINGS)
        wordings = unseen_list if unseen else seen_list
        wording = wordings[int(rng.integers(len(wordings)))]
        if kind == "without" and "no {}" in wording:
            text = text.removeprefix("a ").removeprefix("an ")
        is_sentence = not wording.startswith(("{}", "somebody in", "the "))
        asked.append(PersonQuery(wording.format(text), person, garments, kind, unseen or pair, is_sentence))
    return asked
