"""Reads of a vision tower of transformers, recorded while the model runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenprune.core.reads import (
    ClsAttention,
    ClsFeatures,
    ClsQuery,
    Crops,
    Read,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.reads.attention_tap import AttentionCall, tap
from tokenprune.errors import UnsupportedError
from tokenprune_adapters.clip import tower_reads
from tokenprune_adapters.hf.arrangements.grid_cells import Cells
from tokenprune_adapters.hf.arrangements.unread import Unread
from tokenprune_adapters.hf.crops import CropStates
from tokenprune_adapters.hf.tower_states import MeanStates

if TYPE_CHECKING:
    from tokenprune_adapters.hf.bound_model import BoundTransformersModel

LAYERED = (ClsAttention, ClsQuery, ReceivedAttention, TowerKeys, TowerValues)


@dataclass(frozen=True)
class Encoded:
    """The result of one call of the tower.

    Attributes:
        cells: images and grid cells of the T tokens.
        values: per read, [T, …].
    """

    cells: Cells
    values: dict[Read, Tensor]

    def only(self, kept: Tensor | None) -> Encoded:
        """The tokens at which bool [T] `kept` is true; None = all."""
        if kept is None:
            return self
        values = {read: value[kept.to(value.device)] for read, value in self.values.items()}
        return Encoded(self.cells[kept.to(self.cells.image.device)], values)


class TowerRecording:
    """Records the data of reads in each call of the tower.

    Args:
        bound: the model.
        reads: reads that it provides.

    Raises:
        InputError: a read names a layer that the tower does not have.
        UnsupportedError: a layer has no known attention module.
    """

    def __init__(self, bound: BoundTransformersModel, reads: Sequence[Read]) -> None:
        self.bound, self.reads = bound, reads
        self._callbacks({read: [] for read in reads}, "image")  # raises for layers that do not exist
        self._mean_states()

    def encode(
        self, modality: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Encoded]:
        """Run the tower and the projector; returns the output of the model's method and the recorded data.

        Args:
            modality: "image" or "video".
            original: the model's method that computes its features.
            args, kwargs: its arguments.

        Raises:
            UnsupportedError: the modality is not supported for this family.
        """
        bound = self.bound
        kind = bound.family.images if modality == "image" else bound.family.videos
        if kind is None:
            raise UnsupportedError(f"{bound.name}: {modality}s are not supported under tokenprune.prune()")
        inputs = {**inspect.signature(original).bind_partial(*args).arguments, **kwargs}
        arrangement = kind(bound.base, inputs, bound.cut)
        if isinstance(arrangement, Unread):
            output = original(*args, **kwargs)
            return output, Encoded(arrangement.placed(_parts(output)), {})
        seen: dict[Read, list[Tensor]] = {read: [] for read in self.reads}
        shapes: list[tuple[int, ...]] = []
        given: list[Tensor] = []
        wants_features = any(isinstance(read, TowerFeatures) for read in self.reads)
        selected = bound.selected_blocks(inputs) if any(isinstance(read, ClsFeatures) for read in self.reads) else []
        crops, means = CropStates(selected), self._mean_states()

        def projected(project: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
            shapes.append(tuple(states.shape))
            if wants_features:
                given.append(arrangement.given(states, *args).detach())
            return project(states, *args, **kwargs)

        with ExitStack() as undo:
            undo.enter_context(shadowed(bound.projector, "forward", projected))
            undo.enter_context(arrangement.recording())
            if any(isinstance(read, (ClsFeatures, Crops)) for read in self.reads):
                crops.attach(bound.blocks[modality], undo)
            means.attach(bound.blocks[modality], undo)
            undo.enter_context(tap(self._callbacks(seen, modality)))
            output = original(*args, **kwargs)
        tokens = arrangement.tokens(sum(part.shape[:-1].numel() for part in _parts(output)))
        cells = arrangement.cells(tokens, sum(shape[0] for shape in shapes))
        values = {read: arrangement.pool(calls, tokens) for read, calls in seen.items() if calls}
        for read in self.reads:
            if isinstance(read, TowerFeatures):
                values[read] = arrangement.features(given, tokens)
            elif isinstance(read, ClsFeatures):
                values[read] = arrangement.pool([crops.cls_features(bound.cut)], tokens)
            elif isinstance(read, TowerStates):
                values[read] = arrangement.pool(means.patches(read, bound.cut), tokens)
            elif isinstance(read, Crops):
                values[read] = arrangement.pool([crops.numbers(bound.cut)], tokens).round().long()
        return output, Encoded(cells, {read: _flat(read, value) for read, value in values.items()})

    def _mean_states(self) -> MeanStates:
        return MeanStates([read for read in self.reads if isinstance(read, TowerStates)], self.bound.tower_layers)

    def _callbacks(
        self, seen: dict[Read, list[Tensor]], modality: str
    ) -> dict[nn.Module, Callable[[AttentionCall], None]]:
        wanted: dict[nn.Module, list[Any]] = {}
        for read in seen:
            if isinstance(read, LAYERED):
                wanted.setdefault(self.bound.tower_attention(read.layer, modality), []).append(read)

        def record(reads: list[Any], found: AttentionCall) -> None:
            for read in reads:
                seen[read].append(self._value(read, found))

        return {module: partial(record, some) for module, some in wanted.items()}

    def _value(self, read: Read, seen: AttentionCall) -> Tensor:
        """[crops, patches, D] of one call of a tower layer."""
        if isinstance(read, ClsAttention):
            return tower_reads.cls_attention(seen, read.heads)[..., None]
        if isinstance(read, ClsQuery):
            return tower_reads.cls_query(seen).expand(-1, seen.query.shape[2] - self.bound.cut, -1)
        if isinstance(read, TowerKeys):
            value = tower_reads.keys(seen, read.heads)
        elif isinstance(read, TowerValues):
            value = tower_reads.values(seen)
        else:
            value = tower_reads.received_attention(seen)[..., None]
        return value[:, self.bound.cut :]


def _flat(read: Read, value: Tensor) -> Tensor:
    return value.squeeze(-1) if isinstance(read, (ClsAttention, ReceivedAttention, Crops)) else value


def _parts(output: Any) -> Sequence[Tensor]:
    """The image features that a model returned: together, or image by image."""
    features = getattr(output, "pooler_output", output)
    if features is None and (several := getattr(output, "deepstack_features", None)):
        features = several[0][1]  # Granite 4 Vision's, for several layers of the decoder, of the same tokens
    if features is None:  # Llama 4's, before the projector, which takes each alone
        features = output.last_hidden_state
    return [features] if isinstance(features, Tensor) else features
