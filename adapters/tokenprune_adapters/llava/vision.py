"""The reads of a CLIP tower and a projector: features, [CLS], keys, values, pixels, CLIP's shared space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.reads import (
    ClipImageEmbeddings,
    ClipTextEmbeddings,
    ClsAttention,
    ClsFeatures,
    ClsQuery,
    Crops,
    Pixels,
    Projector,
    Read,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.reads.attention_tap import AttentionCall, tap
from tokenprune.errors import InputError
from tokenprune_adapters.clip import tower_reads
from tokenprune_adapters.clip.shared_space import ClipSpace


class TowerReads(Protocol):
    """The result of a tower on one image, for `vision_source`; N image tokens. See `tokenprune.core.reads`."""

    @property
    def tower(self) -> nn.Module:
        """The CLIP vision model."""

    @property
    def layers(self) -> int:
        """Number of the tower's layers."""

    @property
    def features(self) -> Tensor:
        """[1, N, C], the projector's input."""

    @property
    def cls_features(self) -> Tensor:
        """[1, 1, C], [CLS] of the same states."""

    def each_patch(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function, [1, P, C] to float32 [1, P, D], to the patch states of the features: [1, N, D]."""

    def cls_attention(self, layer: int, heads: str = "mean") -> Tensor:
        """float32 [1, N]."""

    def received_attention(self, layer: int) -> Tensor:
        """float32 [1, N]."""

    def cls_query(self, layer: int) -> Tensor:
        """float32 [1, 1, C]."""

    def keys(self, layer: int, heads: str = "joint") -> Tensor:
        """float32 [1, N, C]."""

    def values(self, layer: int) -> Tensor:
        """float32 [1, N, C]."""

    def mean_state(self, read: TowerStates) -> Tensor:
        """float32 [1, N, C]."""


@dataclass(frozen=True)
class TowerRun:
    """The hidden states of one image in the tower, from which all reads of the tower are computed; `run_tower` may
    run several at once, to be separated by `each_image`.

    Queries and keys of a layer are computed on first use, by that layer's attention on its input states, and cached.

    Args:
        tower: the CLIP vision model.
        states: its hidden states, [1, 1 + N, C] each, [CLS] first; `states[i]` enters layer i.
        select_layer: index into `states` of the projector's input.
        mask: additive attention mask of its layers, [1, 1, 1 + N, 1 + N]; None = every patch is visible.
    """

    tower: nn.Module
    states: tuple[Tensor, ...]
    select_layer: int = -2
    mask: Tensor | None = None
    _seen: dict[int, AttentionCall] = field(default_factory=dict, repr=False)

    def each_image(self) -> list[TowerRun]:
        """The run of each image of a batch; views of its states, not copies."""
        masks = [None] * len(self.states[0]) if self.mask is None else torch.split(self.mask, 1)
        parts = zip(*(torch.split(states, 1) for states in self.states), strict=True)
        return [TowerRun(self.tower, part, self.select_layer, mask) for part, mask in zip(parts, masks, strict=True)]

    @property
    def layers(self) -> int:
        """Number of the tower's layers."""
        return len(self.states) - 1

    @property
    def features(self) -> Tensor:
        """[1, N, C], the projector's input."""
        return self.states[self.select_layer][:, 1:]

    @property
    def cls_features(self) -> Tensor:
        """[1, 1, C], [CLS] of the same states."""
        return self.states[self.select_layer][:, :1]

    def each_patch(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """See `TowerReads.each_patch`; every patch is an image token."""
        return function(self.features)

    def seen(self, layer: int) -> AttentionCall:
        """Queries, keys and values of a layer's attention.

        Args:
            layer: 0-based, or negative from the end.

        Raises:
            InputError: the tower has no such layer.
        """
        number = layer + self.layers if layer < 0 else layer
        if not 0 <= number < self.layers:
            raise InputError(f"tower layer {layer} was requested, but the vision tower has {self.layers} layers")
        if number not in self._seen:
            block = _blocks(self.tower)[number]

            def store(seen: AttentionCall) -> None:
                self._seen[number] = seen

            with torch.no_grad(), tap({block.self_attn: store}):
                block.self_attn(block.layer_norm1(self.states[number]), attention_mask=self.mask)
        return self._seen[number]

    def cls_attention(self, layer: int, heads: str = "mean") -> Tensor:
        """float32 [1, N]: attention of [CLS] to the patches, see `tokenprune.core.reads.ClsAttention`."""
        return tower_reads.cls_attention(self.seen(layer), heads)

    def received_attention(self, layer: int) -> Tensor:
        """float32 [1, N]: mean attention that the patches receive."""
        return tower_reads.received_attention(self.seen(layer))[:, 1:]

    def cls_query(self, layer: int) -> Tensor:
        """float32 [1, 1, C]: the query of [CLS], heads concatenated."""
        return tower_reads.cls_query(self.seen(layer))

    def keys(self, layer: int, heads: str = "joint") -> Tensor:
        """float32 [1, N, C]: the patches' keys, see `tokenprune.core.reads.TowerKeys`."""
        return tower_reads.keys(self.seen(layer), heads)[:, 1:]

    def values(self, layer: int) -> Tensor:
        """float32 [1, N, C]: the patches' values, heads concatenated."""
        return tower_reads.values(self.seen(layer))[:, 1:]

    def mean_state(self, read: TowerStates) -> Tensor:
        """float32 [1, N, C]: the patches' mean state. Raises InputError if the tower has no such layers."""
        return tower_reads.mean_state(self.states[number][:, 1:] for number in read.numbers(self.layers))


def run_tower(tower: nn.Module, pixels: Tensor, select_layer: int = -2, mask: Tensor | None = None) -> TowerRun:
    """Run the tower on one image, or on a batch of them.

    Args:
        tower: the CLIP vision model.
        pixels: [1, 3, H, W], or [B, 3, H, W] for a run of B images.
        select_layer: index into the hidden states, of which 0 are the embeddings, of the projector's input, without
            [CLS].
        mask: see `TowerRun`.
    """
    weight = next(tower.parameters())
    hidden = {} if mask is None else {"attention_mask": mask}
    pixels = pixels.to(device=weight.device, dtype=weight.dtype)
    states = tower(pixels, output_hidden_states=True, **hidden).hidden_states
    return TowerRun(tower, tuple(states), select_layer, mask)


def vision_source(
    run: TowerReads,
    projector: Callable[[Tensor], Tensor],
    pixels: Callable[[], Tensor],
    rows: int,
    clip_space: ClipSpace | None = None,
    texts: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> VisionSource:
    """All reads of the vision side.

    Args:
        run: the tower's result on the image that all batch rows share.
        projector: [B, k, C] to [B, k, H].
        pixels: returns the image that the tower's grid covers, uint8 [1, h, w, 3].
        rows: number of batch rows.
        clip_space: the shared space of the tower's whole CLIP model, if available.
        texts: by wording (see `tokenprune.core.reads.ClipTextEmbeddings`), the texts of each batch row.
    """
    inputs = _VisionInputs(run, projector, pixels, rows, clip_space, texts or {})
    answers = _ANSWERS if clip_space is None else {**_ANSWERS, **_IN_CLIP_SPACE}
    return VisionSource({kind: partial(answer, inputs) for kind, answer in answers.items()}, run.layers)


@dataclass(frozen=True)
class _VisionInputs:
    """The arguments of `vision_source`."""

    run: TowerReads
    projector: Callable[[Tensor], Tensor]
    pixels: Callable[[], Tensor]
    rows: int
    clip_space: ClipSpace | None
    texts: Mapping[str, Sequence[Sequence[str]]]

    def for_rows(self, value: Tensor) -> Tensor:
        return value.expand(self.rows, *value.shape[1:])

    def for_tokens(self, value: Tensor) -> Tensor:
        """Expand [1, 1, C] of the only crop to every token of every row."""
        return value.expand(self.rows, self.run.features.shape[1], -1)

    def crops(self) -> Tensor:
        features = self.run.features
        return torch.zeros(self.rows, features.shape[1], dtype=torch.int64, device=features.device)

    def image_embeddings(self) -> Tensor:
        assert self.clip_space is not None
        return self.for_rows(self.run.each_patch(partial(self.clip_space.embed_image, self.run.tower)))

    def text_embeddings(self, read: ClipTextEmbeddings) -> tuple[Tensor, Tensor]:
        assert self.clip_space is not None
        texts = self.texts.get(read.wording)
        if texts is None:
            known = f"one of {', '.join(self.texts)}" if self.texts else "texts= to be passed to vision_source"
            raise InputError(f"ClipTextEmbeddings(wording={read.wording!r}) found, expected {known}")
        device = self.run.features.device
        known_texts = {text for row in texts for text in row}
        embedded = {text: self.clip_space.embed_texts([text], read.cut, device) for text in known_texts}
        rows = [torch.cat([embedded[text] for text in row]) for row in texts]
        exist = [torch.ones(len(row), dtype=torch.bool, device=device) for row in rows]
        return pad_sequence(rows, batch_first=True), pad_sequence(exist, batch_first=True)


_ANSWERS: dict[type[Read], Callable[[_VisionInputs, Any], Any]] = {
    TowerFeatures: lambda inputs, read: inputs.for_rows(inputs.run.features),
    ClsAttention: lambda inputs, read: inputs.for_rows(inputs.run.cls_attention(read.layer, read.heads)),
    ReceivedAttention: lambda inputs, read: inputs.for_rows(inputs.run.received_attention(read.layer)),
    ClsFeatures: lambda inputs, read: inputs.for_tokens(inputs.run.cls_features),
    ClsQuery: lambda inputs, read: inputs.for_tokens(inputs.run.cls_query(read.layer)),
    Crops: lambda inputs, read: inputs.crops(),
    TowerKeys: lambda inputs, read: inputs.for_rows(inputs.run.keys(read.layer, read.heads)),
    TowerValues: lambda inputs, read: inputs.for_rows(inputs.run.values(read.layer)),
    TowerStates: lambda inputs, read: inputs.for_rows(inputs.run.mean_state(read)),
    Projector: lambda inputs, read: inputs.projector,
    Pixels: lambda inputs, read: inputs.for_rows(inputs.pixels()),
}

_IN_CLIP_SPACE: dict[type[Read], Callable[[_VisionInputs, Any], Any]] = {
    ClipImageEmbeddings: lambda inputs, read: inputs.image_embeddings(),
    ClipTextEmbeddings: lambda inputs, read: inputs.text_embeddings(read),
}


def offers(clip_space: ClipSpace | None) -> frozenset[type[Read]]:
    """The kinds of reads that `vision_source` provides."""
    return frozenset(_ANSWERS) if clip_space is None else frozenset((*_ANSWERS, *_IN_CLIP_SPACE))


def count_layers(tower: nn.Module) -> int:
    """Number of layers of a tower (`VisionSource.layers`), known without an image."""
    return len(_blocks(tower))


def _blocks(tower: nn.Module) -> Any:
    inner: Any = getattr(tower, "vision_model", tower)  # nested in some releases of transformers
    return inner.encoder.layer if hasattr(inner.encoder, "layer") else inner.encoder.layers  # InternVL, CLIP
