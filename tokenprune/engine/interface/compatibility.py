"""Compatibility of strategies and models, decided without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import nn

from tokenprune import api
from tokenprune.core.reads import Read
from tokenprune.core.scheduling.requirements import check_fit, declared_reads
from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.engine.calls.wrappers import unwrapped
from tokenprune.engine.decoder import Decoder, find_decoder
from tokenprune.engine.interface.bound_model import bound_model_of
from tokenprune.errors import IncompatibleError, InputError, UnsupportedError


class Declared(Protocol):
    """A model that declares what strategies may read of it: a `BoundModel`, or a model of an adapter's own."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def decoder(self) -> Any:
        """The module that runs the decoder layers, or has it inside."""

    @property
    def tower_layers(self) -> int:
        """Layers of the vision tower, 0 where there is none."""

    def offers(self) -> frozenset[type[Read]]:
        """Kinds of reads that the vision side can answer."""


def declares(model: Any) -> TypeGuard[Declared]:
    """True if a model declares what strategies may read of it."""
    return all(hasattr(model, name) for name in ("name", "decoder", "tower_layers", "offers"))


def shape_on(model: Declared, decoder: Decoder | None = None) -> Shape:
    """The shape of a run on this model with a typical number of image tokens.

    Args:
        model: what declares.
        decoder: the one inside it, where it has been found already.

    Raises:
        UnsupportedError: the model has no decoder to hook into.
    """
    return (decoder or find_decoder(model.decoder)).typical_shape(model.offers(), model.tower_layers)


def check_on(strategy: Strategy, model: Declared, decoder: Decoder | None = None) -> set[Read]:
    """Check that a strategy is compatible with a model; its reads there. Arguments as for `shape_on`.

    Raises:
        IncompatibleError: see `check_fit`.
        UnsupportedError: the model has no decoder to hook into.
    """
    decoder = decoder or find_decoder(model.decoder)
    return check_fit(strategy, model.name, shape_on(model, decoder), multimodal_rope=decoder.multimodal_rope)


@dataclass(frozen=True)
class Compatibility:
    """Result of `compatible`.

    Attributes:
        strategy: its name.
        model: its name.
        reads: names of what the strategy reads on this model, sorted.
        missing: those of them that the model does not offer.
        reason: why it cannot run, the text of the `IncompatibleError` that running it would raise; empty if it can.

    Example:
        >>> import tokenprune as tp
        >>> from tokenprune.testing.tiny_decoders import tiny_llama
        >>> found = tp.compatible("cdpruner", tiny_llama(layers=4))
        >>> found.runs, found.missing
        (False, ('ClipImageEmbeddings', 'ClipTextEmbeddings'))
    """

    strategy: str
    model: str
    reads: tuple[str, ...]
    missing: tuple[str, ...] = ()
    reason: str = ""

    @property
    def runs(self) -> bool:
        """True if the model provides everything that the strategy requires."""
        return not self.reason

    def __bool__(self) -> bool:
        return self.runs


def compatible(strategy: Strategy | str, model: Any) -> Compatibility:
    """Check whether a strategy, with its options, runs on a model, without running the model.

    The answer follows from declarations: what the strategy's stages read, what the model's adapter offers, and how the
    strategy numbers positions. What depends on the input is checked when the model runs: a budget that the number
    of image tokens cannot meet, a query row that the prompt does not have.

    Args:
        strategy: an instance, or a name for its default options.
        model: what `tokenprune.load` returns or `tokenprune.prune` takes. A plain decoder, whose image tokens the
            caller marks, offers what the engine reads from any decoder and nothing else.

    Raises:
        UnknownNameError: no such strategy.
        OptionError: no strategy, or no model.
        UnsupportedError: no adapter knows the model, it has no decoder to hook into, or it does not declare what it
            offers.

    Example:
        >>> import tokenprune as tp
        >>> bool(tp.compatible("csp", tp.load("lisa-tiny")))
        True
    """
    chosen = api.strategy(strategy) if isinstance(strategy, str) else checked_strategy(strategy)
    declared = declaration_of(model)
    decoder = find_decoder(declared.decoder)
    shape = shape_on(declared, decoder)
    wanted = declared_reads(chosen, shape)
    reads, missing = (tuple(sorted({str(read) for read in some})) for some in (wanted, _not_in(shape, wanted)))
    try:
        check_on(chosen, declared, decoder)
    except IncompatibleError as error:
        return Compatibility(chosen.name, declared.name, reads, missing, str(error))
    return Compatibility(chosen.name, declared.name, reads)


def _not_in(shape: Shape, reads: set[Read]) -> set[Read]:
    return {read for read in reads if not shape.offers(type(read))}


def declaration_of(model: Any) -> Declared:
    """The declarations of a model, its own or its adapter's; errors as in `compatible`."""
    model = unwrapped(model)
    if declares(model):
        return model
    if hasattr(model, "segment"):
        raise UnsupportedError(
            f"{type(model).__name__} does not tell what strategies may read of it; an adapter's model does by "
            "offers(), tower_layers and decoder"
        )
    try:
        return bound_model_of(model)
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
