"""Which reads a strategy requires of a model, and whether the model provides them; checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenprune.core.reads import (
    AttentionFrom,
    Embeddings,
    HiddenStates,
    LayerKeys,
    LayerRead,
    LayerValues,
    PositionKernel,
    PositionPrior,
    Read,
    RotaryTables,
    TextEmbeddings,
    TextKeys,
    TextStates,
    TextValues,
)
from tokenprune.core.reads.own import provides
from tokenprune.core.stage import Shape, Stage, declared_stages
from tokenprune.core.strategy import Strategy
from tokenprune.errors import IncompatibleError, PluginError, TokenPruneError

DECODER_READS: frozenset[type[Read]] = frozenset(
    (
        AttentionFrom,
        PositionKernel,
        PositionPrior,
        RotaryTables,
        HiddenStates,
        TextStates,
        LayerKeys,
        TextKeys,
        LayerValues,
        TextValues,
        Embeddings,
        TextEmbeddings,
        LayerRead,
    )
)
"""The reads that the engine provides for any decoder."""

TYPICAL_TOKENS = 576  # assumed while the number of image tokens is unknown (LLaVA-1.5's)


def incompatibility(
    strategy: str, model: str, reads: Iterable[Read], offers: frozenset[type[Read]]
) -> IncompatibleError | None:
    """The error that lists the reads that a model does not provide, or None."""
    kinds = {type(read) for read in reads if not provides(offers, type(read))}
    if not kinds:
        return None
    missing = sorted(kind.__name__ for kind in kinds)
    needs = sorted({kind.needs for kind in kinds if kind.needs})
    needed = f"; that needs {' and '.join(needs)}" if needs else ""
    offered = ", ".join(sorted(kind.__name__ for kind in offers))
    return IncompatibleError(
        f"strategy {strategy!r} is incompatible with model {model!r}: requires {', '.join(missing)}, model provides "
        f"{offered}{needed}; choose another strategy or another model"
    )


def declared_reads(strategy: Strategy, shape: Shape) -> set[Read]:
    """All reads of a strategy's stages on this shape.

    Empty if the strategy cannot declare stages for this shape; the prefill, whose shape is known, checks again.
    """
    try:
        return _reads(strategy, shape)
    except IncompatibleError:
        return set()


def _reads(strategy: Strategy, shape: Shape) -> set[Read]:
    return {read for stage in _stages(strategy, shape) for read in stage.reads}


def _stages(strategy: Strategy, shape: Shape) -> list[Stage]:
    try:
        return declared_stages(strategy, shape)
    except (IncompatibleError, PluginError):
        raise
    except TokenPruneError:
        return []


def check_layers(strategy: str, model: str, stages: Iterable[Stage], attends: Sequence[bool]) -> None:
    """Check that stages read the attention, and prune the KV caches, of layers that have them.

    Args:
        strategy, model: names, for messages.
        stages: the strategy's.
        attends: for each layer of the model, whether it attends to the sequence; the others keep a state of it.

    Raises:
        IncompatibleError: a stage needs the attention or the KV cache of a layer that has none.
    """
    if all(attends):
        return
    layers = [layer for layer, has in enumerate(attends) if has]
    told = f"strategy {strategy!r} is incompatible with model {model!r}: stage"
    only = f"only layers {_listed(layers)} attend to the sequence"
    for stage in stages:
        for read in stage.reads:
            if not (read.looks_back or isinstance(read, (AttentionFrom, PositionKernel))):
                continue
            back = int(read.looks_back)
            if stage.layer - back not in layers:
                starts = [layer + back for layer in layers if layer + back < len(attends)]
                raise IncompatibleError(
                    f"{told} {stage.name!r} at layer {stage.layer} reads {type(read).__name__} of layer "
                    f"{stage.layer - back}, which keeps a state instead; {only}: let the stage begin at layer "
                    f"{_listed(starts, 'or')}, or choose a strategy that does not read the decoder's attention"
                )
        if stage.prune_earlier_caches and not all(attends[stage.caches_from : stage.layer]):
            raise IncompatibleError(
                f"{told} {stage.name!r} prunes the KV caches of layers {stage.caches_from} to {stage.layer - 1}, some "
                f"of which keep a state, from which no token can be removed; {only}: choose another strategy"
            )


def _listed(numbers: Sequence[int], last: str = "and") -> str:
    *most, end = map(str, numbers)
    return f"{', '.join(most)} {last} {end}" if most else end


def check_fit(
    strategy: Strategy, model: str, shape: Shape, *, multimodal_rope: bool = False, attends: Sequence[bool] = ()
) -> set[Read]:
    """The reads that the strategy requires on a model of this kind.

    Args:
        strategy: bound to a shape or not.
        model: its name.
        shape: what is known about every run on it; `readable` must be set.
        multimodal_rope: whether positions have more than one axis.
        attends: for each layer, whether it attends to the sequence; see `check_layers`.

    Raises:
        IncompatibleError: the model does not provide a read, a layer that is read has no attention, the strategy
            renumbers positions that have several axes, or its `stages` raised it (too few layers, too few heads).
    """
    stages = _stages(strategy, shape)
    reads = {read for stage in stages for read in stage.reads}
    error = incompatibility(strategy.name, model, reads, shape.readable or frozenset())
    if error is not None:
        raise error
    check_layers(strategy.name, model, stages, attends)
    policies = [stage.positions or strategy.positions for stage in stages] or [strategy.positions]
    if multimodal_rope and "renumber" in policies:
        raise IncompatibleError(
            f"strategy {strategy.name!r} is incompatible with model {model!r}: it renumbers positions, which is not "
            "defined for a multimodal rotary embedding (time, height, width); use positions='keep'"
        )
    return reads
