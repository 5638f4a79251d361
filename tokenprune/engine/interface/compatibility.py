"""Compatibility of strategies and models, checked without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import nn

from tokenprune import api
from tokenprune.core.reads import Read
from tokenprune.core.scheduling.requirements import check_fit, declared_reads
from tokenprune.core.stage import RENUMBERS, Shape
from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.engine.calls.wrappers import unwrapped
from tokenprune.engine.decoder import Decoder, find_decoder
from tokenprune.engine.interface.checked_model import bound_model_of
from tokenprune.errors import IncompatibleError, InputError, UnsupportedError


class Declared(Protocol):
    """A model that declares the reads that it provides: a `BoundModel`, or a model class of an adapter."""

    @property
    def name(self) -> str:
        """Name of the model, for messages."""

    @property
    def decoder(self) -> Any:
        """The module that runs the decoder layers, or a module that contains it."""

    @property
    def tower_layers(self) -> int:
        """Number of layers of the vision tower, 0 without one."""

    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads that the vision side provides."""


def declares(model: Any) -> TypeGuard[Declared]:
    """True if a model declares the reads that it provides."""
    return all(hasattr(model, name) for name in ("name", "decoder", "tower_layers", "offers"))


def shape_on(model: Declared, decoder: Decoder | None = None) -> Shape:
    """The shape of a run on this model with a typical number of image tokens.

    Args:
        model: the model.
        decoder: its decoder, if already found.

    Raises:
        UnsupportedError: the model contains no decoder.
    """
    return (decoder or find_decoder(model.decoder)).typical_shape(model.offers(), model.tower_layers)


def check_on(strategy: Strategy, model: Declared, decoder: Decoder | None = None) -> set[Read]:
    """Check that a strategy is compatible with a model; returns its reads. Arguments as for `shape_on`.

    Raises:
        IncompatibleError: see `check_fit`.
        UnsupportedError: the model contains no decoder.
    """
    decoder = decoder or find_decoder(model.decoder)
    shape = shape_on(model, decoder)
    return check_fit(strategy, model.name, shape, multimodal_rope=decoder.multimodal_rope, attends=decoder.attends)


@dataclass(frozen=True)
class Compatibility:
    """Result of `compatible`.

    Attributes:
        strategy: name of the strategy.
        model: name of the model.
        reads: names of the strategy's reads on this model, sorted.
        missing: those of them that the model does not provide.
        reason: the message of the `IncompatibleError` that running the pair would raise; empty if compatible.
        warning: what is likely to cost accuracy: that a strategy renumbers positions on a segmentation model.

    Examples:
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
    warning: str = ""

    @property
    def runs(self) -> bool:
        """True if the model provides everything that the strategy requires."""
        return not self.reason

    def __bool__(self) -> bool:
        return self.runs


def compatible(strategy: Strategy | str, model: Any) -> Compatibility:
    """Check whether a strategy, with its options, runs on a model, without running the model.

    The result follows from declarations: the reads of the strategy's stages, the reads that the model's adapter
    provides, and the strategy's position policy. Conditions on the input are checked when the model runs, such as a
    budget that is too small for the number of image tokens, or a query row that the prompt does not have.

    Args:
        strategy: an instance, or a name for its default options.
        model: a result of `tokenprune.load`, or a model that `tokenprune.prune` accepts. A plain decoder, whose image
            tokens the caller marks, provides only the reads that the engine provides for any decoder.

    Raises:
        UnknownNameError: no such strategy.
        OptionError: `strategy` is not a strategy, or `model` not a model.
        UnsupportedError: no adapter supports the model, it contains no decoder, or it does not declare its reads.

    Examples:
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
    moved = hasattr(declared, "segment") and chosen.positions == "renumber"
    return Compatibility(chosen.name, declared.name, reads, warning=f"{chosen.name} {RENUMBERS}" if moved else "")


def _not_in(shape: Shape, reads: set[Read]) -> set[Read]:
    return {read for read in reads if not shape.offers(type(read))}


def declaration_of(model: Any) -> Declared:
    """The declarations of a model, its own or its adapter's; errors as in `compatible`."""
    model = unwrapped(model)
    if declares(model):
        return model
    if hasattr(model, "segment"):
        raise UnsupportedError(
            f"{type(model).__name__} does not declare the reads that it provides; a model class of an adapter needs "
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
