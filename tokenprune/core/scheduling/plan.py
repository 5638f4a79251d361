"""The plan of a prefill: a strategy's declared stages for a batch whose rows may differ in shape."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.ledger import LayerEntry, Ledger, LookAhead
from tokenprune.core.reads import AttentionFrom, LayerRead
from tokenprune.core.scheduling.requirements import incompatibility
from tokenprune.core.stage import Shape, Stage, check_tokens, declared_stages
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, PluginError
from tokenprune.plugins.attribution import blamed_strategy


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Batch rows whose stages begin at the same layers and have the same reads.

    A strategy chooses for one group at a time, as if the other rows had no image tokens.

    Attributes:
        strategy: bound to the shape of the group's row with most image tokens.
        rows: bool [batch].
        size: image tokens of that row.
        memory: what the strategy passes from stage to stage.
    """

    strategy: Strategy
    rows: Tensor
    size: int
    memory: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def whole(self) -> bool:
        """Whether the group is the whole batch."""
        return bool(self.rows.all())


@dataclass(frozen=True)
class PlannedStage:
    """A declared stage for a group of batch rows.

    Attributes:
        stage: as declared for the group's row with most image tokens.
        target: int64 [batch], −1 where a row's stage declares no number, 0 or −1 outside the group.
        own: the stage as declared for each batch row.
        group: the rows that the stage is for.
    """

    stage: Stage
    target: Tensor
    own: tuple[Stage, ...]
    group: RowGroup


def plan(strategy: Strategy, shapes: list[Shape], model: str = "") -> tuple[Strategy, list[PlannedStage]]:
    """Bind the strategy to the batch's shapes and align the rows' stages.

    Rows whose stages begin at different layers, which a budget can cause for rows of different sizes, form groups.

    Args:
        strategy: with a budget or without.
        shapes: of the batch rows.
        model: its name, for messages.

    Returns the strategy bound to the row with most image tokens, and the stages of all groups in the order of layers.

    Raises:
        PluginError: stages that are not in ascending order, or at layers that the model does not have.
        BudgetError: a budget that cannot be met on one of the shapes.
        IncompatibleError: a stage reads what the model does not provide.
    """
    bound = {shape: _ready(strategy, shape, model) for shape in shapes}
    widest = max(shapes, key=lambda shape: shape.image_tokens)
    leader, stages = bound[widest]
    if widest.image_tokens == 0:
        return leader, []  # no image tokens in the prompt
    groups: dict[Any, set[int]] = {_walk(stages): set()}
    for row, shape in enumerate(shapes):
        # a row without image tokens has no budget to meet: it joins the widest
        groups.setdefault(_walk(bound[shape][1] if shape.image_tokens else stages), set()).add(row)
    found = [planned for rows in groups.values() for planned in _grouped(rows, shapes, bound)]
    return leader, sorted(found, key=lambda planned: planned.stage.layer)  # stable: stages of one row keep their order


def _walk(stages: list[Stage]) -> tuple[Any, ...]:
    """What the stages of all rows of a group have in common."""
    return tuple(
        (stage.name, stage.layer, stage.reads, stage.positions, stage.prune_earlier_caches, stage.caches_from)
        for stage in stages
    )


def _grouped(
    rows: set[int], shapes: list[Shape], bound: dict[Shape, tuple[Strategy, list[Stage]]]
) -> Iterator[PlannedStage]:
    """The stages of a group of rows, which differ only in their numbers of tokens."""
    widest = max((shapes[row] for row in rows), key=lambda shape: shape.image_tokens)
    strategy, stages = bound[widest]
    group = RowGroup(strategy, torch.tensor([row in rows for row in range(len(shapes))]), widest.image_tokens)
    for number, stage in enumerate(stages):
        idle = replace(stage, tokens=None if stage.tokens is None else 0)
        own = tuple(
            bound[shape][1][number] if row in rows and shape.image_tokens else idle for row, shape in enumerate(shapes)
        )
        yield PlannedStage(stage, torch.tensor([-1 if s.tokens is None else s.tokens for s in own]), own, group)


@dataclass
class _Known:
    """The bound copies of a strategy, by shape; invalid once one of the strategy's attributes was replaced."""

    strategy: weakref.ref[Strategy]
    attributes: dict[str, Any]
    bound: dict[Shape, Strategy] = field(default_factory=dict)


_KNOWN: dict[int, _Known] = {}  # by id: an author's class may have equality without a hash
_SHAPES = 256  # cached per strategy


def _bound(strategy: Strategy, shape: Shape) -> Strategy:
    """The strategy bound to a shape; a budget is solved once for each shape."""
    key = id(strategy)
    known = _KNOWN.get(key)
    if known is None or known.strategy() is not strategy or not _same(known.attributes, vars(strategy)):
        gone = weakref.ref(strategy, lambda _: _KNOWN.pop(key, None))
        known = _KNOWN[key] = _Known(gone, dict(vars(strategy)))
    bound = known.bound.get(shape)
    if bound is None:
        bound = strategy.bind(shape)
        if bound is strategy:  # caching it would keep it alive
            return bound
        while len(known.bound) >= _SHAPES:  # remove the oldest
            known.bound.pop(next(iter(known.bound)), None)
        known.bound[shape] = bound
    return bound


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return before.keys() == now.keys() and all(value is now[name] for name, value in before.items())


def _ready(strategy: Strategy, shape: Shape, model: str) -> tuple[Strategy, list[Stage]]:
    """The strategy bound to a shape and its stages, checked."""
    try:
        with blamed_strategy(strategy.name, ": bind()"):
            ready = _bound(strategy, shape)
    except BudgetError:  # stages outside the model are the better error
        _check_layers(strategy, declared_stages(strategy, shape), shape)
        raise
    if not isinstance(ready, Strategy):
        raise PluginError(f"strategy {strategy.name!r}: bind() gave {ready!r}; expected a strategy")
    stages = _checked_stages(ready, shape)
    if shape.readable is not None:
        reads = [read for stage in stages for read in stage.reads]
        wrong = incompatibility(strategy.name, model, reads, shape.readable)
        if wrong is not None:
            raise wrong
    return ready, stages


def _checked_stages(strategy: Strategy, shape: Shape) -> list[Stage]:
    stages = declared_stages(strategy, shape)
    _check_layers(strategy, stages, shape)
    for stage in stages:
        back = [read for read in stage.reads if read.looks_back]
        if stage.layer == 0 and back:
            ahead = " (attention of the stage's own first layer is AttentionFrom(layer='next'))"
            raise PluginError(
                f"strategy {strategy.name!r}, stage {stage.name!r}: {back[0]} reads the layer before layer 0, which "
                f"does not exist; begin it at layer 1 or later{ahead if isinstance(back[0], AttentionFrom) else ''}"
            )
    check_tokens(strategy, stages, shape)
    return stages


def _check_layers(strategy: Strategy, stages: list[Stage], shape: Shape) -> None:
    layers = [stage.layer for stage in stages]
    if layers != sorted(layers) or any(not 0 <= layer < shape.layers for layer in layers):
        raise PluginError(
            f"strategy {strategy.name!r}: stages at layers {layers} found, expected ascending layers in 0 … "
            f"{shape.layers - 1} "
            f"(the model has {shape.layers} layers)"
        )


def declared_ledger(strategy: Strategy, shape: Shape) -> Ledger:
    """The ledger of one row of this shape.

    Where attention is computed ahead, it is that of a plain decoder without gradients and of a stage that merges
    nothing: the layer takes its keys from there.

    Raises:
        BudgetError: a stage whose number of tokens depends on the image.
    """
    _, planned = plan(strategy, [shape])
    ledger = Ledger((shape.image_tokens,), (shape.text_tokens,))
    active = shape.image_tokens
    for layer in range(shape.layers):
        ahead: list[LookAhead] = []
        for stage in (p.stage for p in planned if p.stage.layer == layer):
            if any(isinstance(read, AttentionFrom) and not read.looks_back for read in stage.reads):
                ahead.append(LookAhead(keys=active + shape.text_tokens, queries=1, scored=1))
            if stage.tokens is None:
                raise BudgetError(
                    f"strategy {strategy.name!r}, stage {stage.name!r}: the number of tokens depends on the "
                    "image; give it a fixed number"
                )
            active = stage.tokens
            if stage.prune_earlier_caches:
                for number in range(stage.caches_from, layer):
                    entry = ledger.entries[number]
                    ledger.entries[number] = replace(entry, cached=(min(active, *entry.in_cache),))
        after = [read for p in planned if p.stage.layer == layer + 1 for read in p.stage.reads]
        attention = [read for read in after if isinstance(read, AttentionFrom) and read.looks_back]
        scored = int(any(read.rotary for read in attention))
        width = active + shape.text_tokens
        own = any(isinstance(read, LayerRead) and not read.rotary for read in after)
        plain = int(not all(read.rotary for read in attention))
        if own or plain:  # a plugin's read needs every row, and values too
            ahead.append(LookAhead(width, width if own else 1, width if own else 0, scored=plain))
        ahead[-1:] = [replace(last, reused=width) for last in ahead[-1:]]
        ledger.entries.append(LayerEntry(layer, (active,), (shape.text_tokens,), width, scored, tuple(ahead)))
    return ledger
