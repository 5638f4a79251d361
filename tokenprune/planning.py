"""What a strategy's declared stages mean for a batch whose rows differ in shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.base import Shape, Stage, Strategy, declared_stages
from tokenprune.blame import blamed_strategy
from tokenprune.errors import BudgetError, PluginError


@dataclass(frozen=True)
class PlannedStage:
    """A declared stage for a whole batch.

    Attributes:
        stage: as declared for the row with most image tokens.
        target: int64 [batch], −1 where a row's stage declares no number.
        own: the stage as declared for each batch row.
    """

    stage: Stage
    target: Tensor
    own: tuple[Stage, ...] = ()


def plan(strategy: Strategy, shapes: list[Shape]) -> tuple[Strategy, list[PlannedStage]]:
    """Bind the strategy to the batch's shapes and line up the rows' stages.

    Returns the strategy bound to the row with most image tokens, and its stages.

    Raises:
        PluginError: stages out of order, out of the model, or different in layers from row to row.
        BudgetError: a budget that cannot be met on one of the shapes.
    """
    bound: dict[Shape, tuple[Strategy, list[Stage]]] = {}
    for shape in shapes:
        if shape not in bound:
            try:
                with blamed_strategy(strategy.name, ": bind()"):
                    ready = strategy.bind(shape)
            except BudgetError:  # where stages lie outside the model, that is the reason to tell
                _check_layers(strategy, declared_stages(strategy, shape), shape)
                raise
            if not isinstance(ready, Strategy):
                raise PluginError(f"strategy {strategy.name!r}: bind() gave {ready!r}; expected a strategy")
            bound[shape] = ready, _checked_stages(ready, shape)
    widest = max(shapes, key=lambda shape: shape.image_tokens)
    leader, stages = bound[widest]
    if widest.image_tokens == 0:
        return leader, []  # a prompt of text alone leaves nothing to choose from
    # a row without image tokens has no budget to meet, and follows the others
    idle = [replace(stage, tokens=None if stage.tokens is None else 0) for stage in stages]
    rows = [bound[shape][1] if shape.image_tokens else idle for shape in shapes]
    for row, own in enumerate(rows):
        if [(s.name, s.layer) for s in own] != [(s.name, s.layer) for s in stages]:
            raise PluginError(
                f"strategy {strategy.name!r}: batch row {row} ({shapes[row].image_tokens} image tokens) wants "
                "stages at layers "
                f"{[s.layer for s in own]}, another row at {[s.layer for s in stages]}; run rows of such "
                "different sizes apart"
            )
    targets = [
        torch.tensor([-1 if own[i].tokens is None else own[i].tokens for own in rows]) for i in range(len(stages))
    ]
    owned = [tuple(own[i] for own in rows) for i in range(len(stages))]
    return leader, [PlannedStage(*planned) for planned in zip(stages, targets, owned, strict=True)]


def _checked_stages(strategy: Strategy, shape: Shape) -> list[Stage]:
    stages = declared_stages(strategy, shape)
    _check_layers(strategy, stages, shape)
    for stage in stages:
        if stage.layer == 0 and any(read.looks_back for read in stage.reads):
            raise PluginError(
                f"strategy {strategy.name!r}, stage {stage.name!r}: reads attention or keys of the layer before layer "
                "0, which does not exist; begin it at layer 1 or later (attention of the stage's own first layer is "
                "AttentionFrom(layer='next'))"
            )
        if stage.tokens is not None and not 0 <= stage.tokens <= shape.image_tokens:
            raise PluginError(
                f"strategy {strategy.name!r}, stage {stage.name!r}: declares {stage.tokens} tokens of "
                f"{shape.image_tokens}; expected 0 … {shape.image_tokens}"
            )
    return stages


def _check_layers(strategy: Strategy, stages: list[Stage], shape: Shape) -> None:
    layers = [stage.layer for stage in stages]
    if layers != sorted(layers) or any(not 0 <= layer < shape.layers for layer in layers):
        raise PluginError(
            f"strategy {strategy.name!r}: stages at layers {layers} found, expected ascending layers in 0 … "
            f"{shape.layers - 1} "
            f"(the model has {shape.layers} layers)"
        )
