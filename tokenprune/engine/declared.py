"""What a model declares about itself, and whether a strategy fits it, before anything runs."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

from tokenprune.core.reads import Read
from tokenprune.core.requirements import TYPICAL_TOKENS, check_fit
from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy
from tokenprune.engine.decoder import Decoder, find_decoder


class Declared(Protocol):
    """A model that tells what strategies may read of it: a `Binding`, or a model of an adapter's own."""

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
    """Whether a model tells what strategies may read of it."""
    return all(hasattr(model, name) for name in ("name", "decoder", "tower_layers", "offers"))


def shape_on(model: Declared, decoder: Decoder | None = None) -> Shape:
    """What is known of every run on this model; image tokens stand at a typical number.

    Args:
        model: what declares.
        decoder: the one inside it, where it has been found already.

    Raises:
        UnsupportedError: the model has no decoder to hook into.
    """
    decoder = decoder or find_decoder(model.decoder)
    offers = decoder.offers | model.offers()
    return Shape(len(decoder.layers), TYPICAL_TOKENS, 0, model.tower_layers, offers, decoder.heads)


def check_on(strategy: Strategy, model: Declared, decoder: Decoder | None = None) -> set[Read]:
    """What the strategy reads on this model, once it is known to fit; arguments as for `shape_on`.

    Raises:
        IncompatibleError: see `check_fit`.
        UnsupportedError: the model has no decoder to hook into.
    """
    decoder = decoder or find_decoder(model.decoder)
    return check_fit(strategy, model.name, shape_on(model, decoder), multimodal_rope=decoder.multimodal_rope)
