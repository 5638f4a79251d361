"""InternVL's vision tower: what it gives for the tiles of a picture, and its configuration and tensors' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLVisionModel

from tokenprune.core.reads import TowerStates
from tokenprune.engine.reads.attention_tap import AttentionCall, tap
from tokenprune.errors import CheckpointError, InputError
from tokenprune_adapters.clip import tower_reads
from tokenprune_adapters.common.checkpoint import Checkpoint, Part
from tokenprune_adapters.common.meta_model import meta_model

TILES_AT_ONCE = 16  # limits memory
MERGED = 2  # rows and columns of patches that make an image token
PREFIX = "vision_model."
_NAMES = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("encoder.layer.", "encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".attention.q_proj.", ".attn.qkv.q."),
    (".attention.k_proj.", ".attn.qkv.k."),
    (".attention.v_proj.", ".attn.qkv.v."),
    (".attention.q_norm.", ".attn.q_norm."),
    (".attention.k_norm.", ".attn.k_norm."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
)
_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "norm_type": "norm_type",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "patch_size": "patch_size",
}


def stored_name(name: str) -> str:
    """The name in a checkpoint, as `stored.Rearranged` tells it, of a tensor of `InternVLVisionModel`."""
    for own, theirs in _NAMES:
        name = name.replace(own, theirs)
    return PREFIX + name


def build_tower(
    checkpoint: Checkpoint, config: dict[str, Any], attn_implementation: str | None = None
) -> Part[InternVLVisionModel]:
    """A tower on the meta device, and the names of its tensors.

    Args:
        checkpoint: rearranged, see `stored.Rearranged`.
        config: the whole config.json.
        attn_implementation: as in transformers.

    Raises:
        CheckpointError: config.json describes no such tower.
    """
    about = config.get("vision_config")
    if not isinstance(about, dict):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has no vision_config, which describes the tower; fetch the file again"
        )
    values = {own: about[theirs] for theirs, own in _FIELDS.items() if about.get(theirs) is not None}
    side: Any = config.get("force_image_size") or about.get("image_size")
    patch: Any = about.get("patch_size")
    if not all(isinstance(size, int) and size > 0 for size in (side, patch)) or side % (MERGED * patch):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says tiles of {side!r} pixels and patches of {patch!r}, expected an even "
            "number of patches each way, since two by two make an image token"
        )
    values["image_size"] = side
    tower = meta_model(InternVLVisionModel, values, checkpoint.folder, "InternVL tower", attn_implementation)
    return Part(tower.eval(), {name: stored_name(name) for name in tower.state_dict()})


def merged(patches: Tensor) -> Tensor:
    """Patches [tiles, P, C] of squares, two by two as one token: [tiles, P / 4, 4 · C], the upper two first."""
    tiles, count, width = patches.shape
    side = round(count**0.5) // MERGED
    squares = patches.reshape(tiles, side, MERGED, side, MERGED, width).transpose(2, 3)
    return squares.reshape(tiles, side * side, MERGED * MERGED * width)


@dataclass(frozen=True)
class TilesRun:
    """The hidden states of a picture's tiles in the tower, from which all reads are computed; N image tokens.

    Values of patches other than features are the mean over the four patches of a token (ours).

    Args:
        tower: the vision model.
        states: its hidden states, [tiles, 1 + P, C] each, [CLS] first; `states[i]` enters layer i.
        select_layer: index into `states` of the projector's input.
    """

    tower: Any
    states: tuple[Tensor, ...]
    select_layer: int = -1
    _seen: dict[int, AttentionCall] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> int:
        """Number of the tower's layers."""
        return len(self.states) - 1

    @property
    def tile_tokens(self) -> int:
        """Image tokens of a tile."""
        return int(self.states[0].shape[1] - 1) // MERGED**2

    @property
    def features(self) -> Tensor:
        """[1, N, 4 · C], the projector's input."""
        return merged(self.states[self.select_layer][:, 1:]).flatten(0, 1)[None]

    @property
    def crops(self) -> Tensor:
        """int64 [1, N], the tile of each token."""
        tiles = torch.arange(len(self.states[0]), device=self.states[0].device)
        return tiles.repeat_interleave(self.tile_tokens)[None]

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
            block = self.tower.encoder.layer[number]

            def store(seen: AttentionCall) -> None:
                self._seen[number] = seen

            with torch.no_grad(), tap({block.attention: store}):
                block.attention(block.layernorm_before(self.states[number]))
        return self._seen[number]

    def cls_attention(self, layer: int, heads: str = "mean") -> Tensor:
        """float32 [1, N]: attention of each tile's [CLS], see `tokenprune.core.reads.ClsAttention`."""
        return self._pooled(tower_reads.cls_attention(self.seen(layer), heads)[..., None])[..., 0]

    def received_attention(self, layer: int) -> Tensor:
        """float32 [1, N]: mean attention that the patches receive within their tile."""
        return self._pooled(tower_reads.received_attention(self.seen(layer))[:, 1:, None])[..., 0]

    def cls_query(self, layer: int) -> Tensor:
        """float32 [1, N, C]: the query of [CLS] of each token's tile, heads concatenated."""
        return self._of_tiles(tower_reads.cls_query(self.seen(layer)))

    def keys(self, layer: int, heads: str = "joint") -> Tensor:
        """float32 [1, N, C]: keys, see `tokenprune.core.reads.TowerKeys`."""
        return self._pooled(tower_reads.keys(self.seen(layer), heads)[:, 1:])

    def values(self, layer: int) -> Tensor:
        """float32 [1, N, C]: values, heads concatenated."""
        return self._pooled(tower_reads.values(self.seen(layer))[:, 1:])

    def mean_state(self, read: TowerStates) -> Tensor:
        """float32 [1, N, C]: the mean state. Raises InputError if the tower has no such layers."""
        return self._pooled(tower_reads.mean_state(self.states[number][:, 1:] for number in read.numbers(self.layers)))

    def _of_tiles(self, rows: Tensor) -> Tensor:
        """[tiles, 1, D] -> [1, N, D]."""
        return rows.expand(-1, self.tile_tokens, -1).flatten(0, 1)[None]

    def _pooled(self, values: Tensor) -> Tensor:
        """[tiles, P, D] -> [1, N, D]."""
        side = round(values.shape[1] ** 0.5)
        square = values.transpose(1, 2).reshape(len(values), -1, side, side)
        return functional.avg_pool2d(square, MERGED).flatten(2).transpose(1, 2).flatten(0, 1)[None]


def run_tower(tower: nn.Module, tiles: Tensor, counts: Sequence[int], select_layer: int) -> list[TilesRun]:
    """Run the tower on the tiles of several pictures.

    Args:
        tower: the vision model.
        tiles: [all tiles, 3, side, side].
        counts: tiles of each picture, which follow each other.
        select_layer: see `TilesRun`.
    """
    parts = [tower(part, output_hidden_states=True).hidden_states for part in torch.split(tiles, TILES_AT_ONCE)]
    states = [torch.cat(layer) if len(layer) > 1 else layer[0] for layer in zip(*parts, strict=True)]
    by_picture = zip(*(torch.split(layer, list(counts)) for layer in states), strict=True)
    return [TilesRun(tower, picture, select_layer) for picture in by_picture]
