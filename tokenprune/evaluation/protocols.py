"""Protocols: how queries about an image are asked, and which mask counts as the answer to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.datasets.base import Scene
from tokenprune.errors import IncompatibleError, OptionError
from tokenprune.evaluation.protocol import SegmentationResult, TurnTaking

Protocol: TypeAlias = Literal["forced", "generate"]
"""The names of protocols.

- "forced": the answer is given and holds a mask token for each query, as in the families' own evaluation; queries are
  batched as the model does it (LISA and PixelLM: a conversation each, GLaMM: one conversation).
- "generate": the model answers freely; the mask of a query is the union of those that its answer makes, and empty
  where it makes none.
"""
Ask = Callable[[TurnTaking, Any, Scene, Strategy | None], SegmentationResult]


@dataclass(frozen=True, eq=False)
class Answers:
    """One mask for each query: see `SegmentationResult`."""

    masks: Tensor
    trace: Trace | None
    row_index: list[int]


def protocol_of(name: str) -> Ask:
    """The function that asks all queries of a scene. Raises OptionError for an unknown name."""
    if name not in _PROTOCOLS:
        raise OptionError(f"protocol {name!r} found, expected one of {', '.join(_PROTOCOLS)}")
    return _PROTOCOLS[name]


def _forced(model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None) -> SegmentationResult:
    return model.segment(encoded, *_asked(scene), strategy=strategy, is_sentence=_sentences(scene))


def _generated(model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None) -> SegmentationResult:
    if not model.takes("answer"):
        raise IncompatibleError(
            f"model {model.name!r}: its segment() takes no answer=, which protocol 'generate' needs; use 'forced'"
        )
    found: Any = model.segment(
        encoded, *_asked(scene), strategy=strategy, answer="generate", is_sentence=_sentences(scene)
    )
    height, width = scene.image.shape[:2]
    masks = torch.zeros(len(scene.queries), height, width, dtype=torch.bool, device=found.masks.device)
    rows = list(range(len(scene.queries)))
    for mask, query, row in zip(found.masks, found.query_index, found.row_index, strict=True):
        masks[query] |= mask
        rows[query] = row
    return Answers(masks, found.trace, rows)


def _asked(scene: Scene) -> tuple[list[str]]:
    return ([query.text for query in scene.queries],)


def _sentences(scene: Scene) -> list[bool]:
    return [query.is_sentence for query in scene.queries]


_PROTOCOLS: dict[str, Ask] = {"forced": _forced, "generate": _generated}
assert set(_PROTOCOLS) == set(get_args(Protocol))
