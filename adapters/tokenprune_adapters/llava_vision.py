"""What a CLIP tower and a projector offer to strategies: features, [CLS] attention, keys, pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.engine.tap import Seen, tap
from tokenprune.engine.vision import VisionSource
from tokenprune.errors import InputError
from tokenprune.reads import ClsAttention, Pixels, Projector, Read, ReceivedAttention, TowerFeatures, TowerKeys
from tokenprune_adapters import tower_reads


class TowerReads(Protocol):
    """What `vision_source` needs of a tower's run on one image; N image tokens. See `tokenprune.reads`."""

    @property
    def layers(self) -> int:
        """Number of the tower's layers."""

    @property
    def features(self) -> Tensor:
        """[1, N, C], what the projector reads."""

    def cls_attention(self, layer: int, heads: str = "mean") -> Tensor:
        """float32 [1, N]."""

    def received_attention(self, layer: int) -> Tensor:
        """float32 [1, N]."""

    def keys(self, layer: int) -> Tensor:
        """float32 [1, N, C]."""


@dataclass(frozen=True)
class TowerRun:
    """One image in the tower, kept so that strategies can ask for more than the features.

    Queries and keys of a layer are computed when first asked for, by that layer's own attention on the states that it
    had, and then remembered.

    Args:
        tower: the CLIP vision model.
        states: its hidden states, [1, 1 + N, C] each; `states[i]` enters layer i.
        features: [1, N, C], what the projector reads.
        mask: what its layers add to attention logits, [1, 1, 1 + N, 1 + N]; None where every patch is seen.
    """

    tower: nn.Module
    states: tuple[Tensor, ...]
    features: Tensor
    mask: Tensor | None = None
    _seen: dict[int, Seen] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> int:
        """Number of the tower's layers."""
        return len(self.states) - 1

    def seen(self, layer: int) -> Seen:
        """What the attention of a layer computes with.

        Args:
            layer: 0-based, or negative from the end.

        Raises:
            InputError: the tower has no such layer.
        """
        number = layer + self.layers if layer < 0 else layer
        if not 0 <= number < self.layers:
            raise InputError(f"tower layer {layer} was asked for, but the vision tower has {self.layers} layers")
        if number not in self._seen:
            block = _blocks(self.tower)[number]

            def keep(seen: Seen) -> None:
                self._seen[number] = seen

            with torch.no_grad(), tap({block.self_attn: keep}):
                block.self_attn(block.layer_norm1(self.states[number]), attention_mask=self.mask)
        return self._seen[number]

    def cls_attention(self, layer: int, heads: str = "mean") -> Tensor:
        """float32 [1, N]: attention of [CLS] to the patches, see `tokenprune.reads.ClsAttention`."""
        return tower_reads.cls_attention(self.seen(layer), heads)

    def received_attention(self, layer: int) -> Tensor:
        """float32 [1, N]: mean attention that the patches receive."""
        return tower_reads.received_attention(self.seen(layer))[:, 1:]

    def keys(self, layer: int) -> Tensor:
        """float32 [1, N, C]: the patches' keys, heads concatenated."""
        return tower_reads.keys(self.seen(layer))[:, 1:]


def run_tower(tower: nn.Module, pixels: Tensor, select_layer: int = -2, mask: Tensor | None = None) -> TowerRun:
    """Run the tower on one image.

    Args:
        tower: the CLIP vision model.
        pixels: [1, 3, H, W].
        select_layer: index into the hidden states, number 0 being the embeddings, of what the projector reads. [CLS]
            is left out.
        mask: see `TowerRun`.
    """
    weight = next(tower.parameters())
    hidden = {} if mask is None else {"attention_mask": mask}
    pixels = pixels.to(device=weight.device, dtype=weight.dtype)
    states = tower(pixels, output_hidden_states=True, **hidden).hidden_states
    return TowerRun(tower, tuple(states), states[select_layer][:, 1:], mask)


def vision_source(
    run: TowerReads, projector: Callable[[Tensor], Tensor], pixels: Callable[[], Tensor], rows: int
) -> VisionSource:
    """The answers to everything that strategies may read from the vision side.

    Args:
        run: the tower's run on the one image that all batch rows are about.
        projector: [B, k, C] to [B, k, H].
        pixels: gives the picture as the tower's grid divides it, uint8 [1, h, w, 3].
        rows: number of batch rows.
    """
    shown = _Shown(run, projector, pixels, rows)
    return VisionSource({kind: partial(answer, shown) for kind, answer in _ANSWERS.items()}, run.layers)


@dataclass(frozen=True)
class _Shown:
    """The arguments of `vision_source`."""

    run: TowerReads
    projector: Callable[[Tensor], Tensor]
    pixels: Callable[[], Tensor]
    rows: int

    def for_rows(self, value: Tensor) -> Tensor:
        return value.expand(self.rows, *value.shape[1:])


_ANSWERS: dict[type[Read], Callable[[_Shown, Any], Any]] = {
    TowerFeatures: lambda shown, read: shown.for_rows(shown.run.features),
    ClsAttention: lambda shown, read: shown.for_rows(shown.run.cls_attention(read.layer, read.heads)),
    ReceivedAttention: lambda shown, read: shown.for_rows(shown.run.received_attention(read.layer)),
    TowerKeys: lambda shown, read: shown.for_rows(shown.run.keys(read.layer)),
    Projector: lambda shown, read: shown.projector,
    Pixels: lambda shown, read: shown.for_rows(shown.pixels()),
}

OFFERS = frozenset(_ANSWERS)
"""Kinds of reads that `vision_source` answers."""


def count_layers(tower: nn.Module) -> int:
    """Layers of a CLIP tower: `VisionSource.layers`, known before an image is."""
    return len(_blocks(tower))


def _blocks(tower: nn.Module) -> Any:
    inner: Any = getattr(tower, "vision_model", tower)  # nested in some releases of transformers
    return inner.encoder.layers
