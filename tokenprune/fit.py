"""Whether a strategy fits a model, asked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.base import Shape, Strategy
from tokenprune.errors import IncompatibleError, TokenPruneError
from tokenprune.reads import (
    AttentionFrom,
    Embeddings,
    HiddenStates,
    LayerKeys,
    PositionKernel,
    Read,
    TextEmbeddings,
    TextKeys,
    TextStates,
)

DECODER_READS: frozenset[type[Read]] = frozenset(
    (AttentionFrom, PositionKernel, HiddenStates, TextStates, LayerKeys, TextKeys, Embeddings, TextEmbeddings)
)
"""What the engine reads from any decoder."""

TYPICAL_TOKENS = 576  # what stages are asked with where the number of image tokens is not known yet (LLaVA-1.5's)


def misfit(strategy: str, model: str, reads: Iterable[Read], offers: frozenset[type[Read]]) -> IncompatibleError | None:
    """The error that tells which reads a model does not offer, or None."""
    kinds = {type(read) for read in reads if type(read) not in offers}
    if not kinds:
        return None
    missing = sorted(kind.__name__ for kind in kinds)
    needs = sorted({kind.needs for kind in kinds if kind.needs})
    needed = f"; that needs {' and '.join(needs)}" if needs else ""
    offered = ", ".join(sorted(kind.__name__ for kind in offers))
    return IncompatibleError(
        f"strategy {strategy!r} does not fit model {model!r}: it reads {', '.join(missing)}, and the model offers "
        f"{offered}{needed}; choose another strategy or another model"
    )


def declared_reads(strategy: Strategy, shape: Shape) -> set[Read]:
    """Everything that the stages of a strategy read on this shape.

    Nothing where the strategy cannot tell for this shape; the prefill, which knows the real one, asks again.
    """
    try:
        return {read for stage in strategy.stages(shape) for read in stage.reads}
    except TokenPruneError:
        return set()


def check_fit(
    strategy: Strategy,
    model: str,
    layers: int,
    *,
    vision: frozenset[type[Read]] = frozenset(),
    tower_layers: int = 0,
    multimodal_rope: bool = False,
) -> set[Read]:
    """What the strategy reads on a model of this kind.

    Args:
        strategy: bound to a shape or not.
        model: its name.
        layers: decoder layers.
        vision: reads that its vision side offers.
        tower_layers: layers of its vision tower.
        multimodal_rope: whether positions have several axes.

    Raises:
        IncompatibleError: it reads what the model does not offer, or renumbers positions of several axes.
    """
    offers = DECODER_READS | vision
    reads = declared_reads(strategy, Shape(layers, TYPICAL_TOKENS, 0, tower_layers, offers))
    error = misfit(strategy.name, model, reads, offers)
    if error is not None:
        raise error
    if multimodal_rope and strategy.positions == "renumber":
        raise IncompatibleError(
            f"strategy {strategy.name!r} does not fit model {model!r}: it renumbers positions, which is not defined "
            "for a multimodal rotary embedding (time, height, width); use positions='keep'"
        )
    return reads
