"""Protocols: how the queries about an image are asked, and which masks count as the answer to each."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.datasets.base import Scene
from tokenprune.errors import IncompatibleError, OptionError
from tokenprune.evaluation.models import SegmentationResult, TurnTaking

ProtocolName: TypeAlias = Literal["forced", "lisa", "glamm", "pixellm", "generate"]
"""Names of the protocols; each class below says what it does."""

SENTENCES = 3  # of an image, in GLaMM's evaluation
MUSE_TOKENS = 512  # of an answer, in PixelLM's evaluation


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to the queries of a scene.

    Attributes:
        masks: bool [queries, H, W].
        trace: of the prefill; None without a strategy.
        row_index: the trace's batch row of each query.
        logits: where an answer may hold several masks that are matched to single targets: float [n, H, W] of each
            query; else empty.
    """

    masks: Tensor
    trace: Trace | None
    row_index: list[int]
    logits: list[Tensor] = field(default_factory=list)


class Protocol(ABC):
    """One way to ask."""

    name: ClassVar[str]

    def asked(self, queries: int, scene: int, seed: int) -> list[int]:
        """Which of a scene's queries are asked, by their numbers; by default all."""
        return list(range(queries))

    def batches(self, asked: list[int], model: TurnTaking) -> list[list[int]]:
        """Which of them are asked in one call of the model; by default all."""
        return [asked]

    @abstractmethod
    def answers(self, model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None) -> Answers:
        """Ask all queries of a scene, which holds those of one batch.

        Raises:
            IncompatibleError: the model cannot be asked so.
        """


class Forced(Protocol):
    """The answer is given, and holds a mask token for each query; queries are batched as the model does it."""

    name = "forced"

    def answers(self, model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None) -> Answers:
        """See `Protocol.answers`."""
        found = _segmented(model, encoded, scene, strategy)
        return Answers(found.masks, found.trace, batch_rows(found))


class Lisa(Forced):
    """LISA's evaluation: as "forced", and every query is a conversation of its own, whatever the model."""

    name = "lisa"

    def batches(self, asked: list[int], model: TurnTaking) -> list[list[int]]:
        """See `Protocol.batches`."""
        return [[query] for query in asked] if model.one_conversation else [asked]


class Glamm(Forced):
    """GLaMM's evaluation: at most three of an image's sentences, drawn by the seed, in one conversation."""

    name = "glamm"

    def asked(self, queries: int, scene: int, seed: int) -> list[int]:
        """See `Protocol.asked`."""
        return sorted(random.Random(f"{seed}:{scene}").sample(range(queries), min(SENTENCES, queries)))

    def answers(self, model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None) -> Answers:
        """See `Protocol.answers`."""
        if not model.one_conversation:
            raise IncompatibleError(
                f"model {model.name!r} asks each query in a conversation of its own, and protocol 'glamm' all of an "
                "image in one; use 'lisa'"
            )
        return super().answers(model, encoded, scene, strategy)


class Generate(Protocol):
    """The model answers freely: the mask of a query is the union of those that its answer makes, or empty."""

    name = "generate"
    max_new_tokens = 64

    def answers(self, model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None) -> Answers:
        """See `Protocol.answers`."""
        if not model.takes("answer"):
            raise IncompatibleError(
                f"model {model.name!r}: its segment() takes no answer=, which protocol {self.name!r} needs; use "
                "'forced'"
            )
        options: dict[str, Any] = {"answer": "generate", "max_new_tokens": self.max_new_tokens}
        if model.takes("draft"):
            options["draft"] = False  # what was learnt from earlier answers would change rounding, and times
        found: Any = _segmented(model, encoded, scene, strategy, **options)
        height, width = scene.image.shape[:2]
        number = len(scene.queries)
        masks = torch.zeros(number, height, width, dtype=torch.bool, device=found.masks.device)
        rows, logits = list(range(number)), [found.mask_logits[:0] for _ in range(number)]
        for place, (query, row) in enumerate(zip(found.query_index, found.row_index, strict=True)):
            masks[query] |= found.masks[place]
            logits[query] = torch.cat((logits[query], found.mask_logits[place : place + 1]))
            rows[query] = row
        return Answers(masks, found.trace, rows, logits if self.name == "pixellm" else [])


class PixelLM(Generate):
    """PixelLM's evaluation: answers are generated, and an answer's masks are matched one to one to the targets."""

    name = "pixellm"
    max_new_tokens = MUSE_TOKENS


_PROTOCOLS: dict[str, Protocol] = {kind.name: kind() for kind in (Forced, Lisa, Glamm, PixelLM, Generate)}
assert set(_PROTOCOLS) == set(get_args(ProtocolName))


def protocol_of(name: str) -> Protocol:
    """The protocol of that name. Raises OptionError for an unknown one."""
    if name not in _PROTOCOLS:
        raise OptionError(f"protocol {name!r} found, expected one of {', '.join(_PROTOCOLS)}")
    return _PROTOCOLS[name]


def batch_rows(result: SegmentationResult) -> list[int]:
    """The batch row of the trace for each mask of a forced answer: `row_index`, or by default the mask's own number."""
    return list(getattr(result, "row_index", ())) or list(range(len(result.masks)))


def _segmented(
    model: TurnTaking, encoded: Any, scene: Scene, strategy: Strategy | None, **options: Any
) -> SegmentationResult:
    texts = [query.text for query in scene.queries]
    sentences = [query.is_sentence for query in scene.queries]
    return model.segment(encoded, texts, strategy=strategy, is_sentence=sentences, **options)
