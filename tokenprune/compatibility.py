"""Whether a strategy runs on a model, told without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenprune import api
from tokenprune.core.reads import Read
from tokenprune.core.requirements import declared_reads
from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy
from tokenprune.engine.binding import binding_of
from tokenprune.engine.declared import Declared, check_on, declares, shape_on
from tokenprune.engine.wrapping import unwrapped
from tokenprune.errors import IncompatibleError, InputError, UnsupportedError


@dataclass(frozen=True)
class Compatibility:
    """What `compatible` found.

    Attributes:
        strategy: its name.
        model: its name.
        reads: names of what the strategy reads on this model, sorted.
        missing: those of them that the model does not offer.
        reason: why it cannot run, the text of the `IncompatibleError` that running it would raise; empty if it can.
    """

    strategy: str
    model: str
    reads: tuple[str, ...]
    missing: tuple[str, ...] = ()
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether the model offers everything that the strategy needs."""
        return not self.reason

    def __bool__(self) -> bool:
        return self.runs


def compatible(strategy: Strategy | str, model: Any) -> Compatibility:
    """Whether a strategy, with its options, runs on a model. Nothing of the model is run.

    The answer follows from declarations: what the strategy's stages read, what the model's adapter offers, and how the
    strategy numbers positions. What needs the input to be known is told when the model runs: a budget that the number
    of image tokens cannot meet, a query row that the prompt does not have.

    Args:
        strategy: an instance, or a name for its default options.
        model: what `tokenprune.load` returns or `tokenprune.prune` takes. A plain decoder, whose image tokens the
            caller marks, offers what the engine reads from any decoder and nothing else.

    Raises:
        UnknownNameError: no such strategy.
        UnsupportedError: no adapter knows the model, it has no decoder to hook into, or does not tell what it offers.
    """
    chosen = api.strategy(strategy) if isinstance(strategy, str) else strategy
    declared = declaration_of(model)
    shape = shape_on(declared)
    wanted = declared_reads(chosen, shape)
    reads, missing = (tuple(sorted({str(read) for read in some})) for some in (wanted, _not_in(shape, wanted)))
    try:
        check_on(chosen, declared)
    except IncompatibleError as error:
        return Compatibility(chosen.name, declared.name, reads, missing, str(error))
    return Compatibility(chosen.name, declared.name, reads)


def _not_in(shape: Shape, reads: set[Read]) -> set[Read]:
    return {read for read in reads if not shape.offers(type(read))}


def declaration_of(model: Any) -> Declared:
    """What a model declares, itself or through its adapter; errors as in `compatible`."""
    model = unwrapped(model)
    if declares(model):
        return model
    if hasattr(model, "segment"):
        raise UnsupportedError(
            f"{type(model).__name__} does not tell what strategies may read of it; an adapter's model does by "
            "offers(), tower_layers and decoder"
        )
    try:
        return binding_of(model)
    except InputError:
        return _Plain(type(model).__name__, model)


@dataclass(frozen=True)
class _Plain:
    """A decoder without a vision side."""

    name: str
    decoder: nn.Module
    tower_layers: int = 0

    def offers(self) -> frozenset[type[Read]]:
        return frozenset()
