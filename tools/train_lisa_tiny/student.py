"""Everything that learns in the decoder phases, and how it turns images and queries into prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from common import centres, patch_labels
from model import (
    CHANNELS,
    GRID,
    IMAGE_SIZE,
    WIDTH,
    TowerHeads,
    build_decoder,
    build_tower,
    encode_points,
    point_prompts,
)
from packed import forward_packed
from pretrain import canonical_point
from scenes import anchor_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, SamModel
from vocabulary import Prompts

TAPS = (6, 9, 12)  # after how many layers the pointer loss is taken
TAP_WEIGHTS = (0.5, 0.5, 1.0)
ANCHOR_TAP = 4  # after how many layers the mask query of a relation points at the anchor


class Reading(NamedTuple):
    """What the decoder says of B images with I image tokens and n queries each.

    `pointers`: logits [B, n, I] to the anchor, then per tap to the target. `watched`: log attention [B, n, I] per
    taught head. `prompts`: prompt embeddings [B, n, channels]. `own`: what the image tokens' states, after the last tap
    before the end, would be as prompt embeddings, [B, I, channels]. `states`: of the last layer, [B, n, T, H].
    """

    pointers: list[Tensor]
    watched: list[Tensor]
    prompts: Tensor
    own: Tensor
    states: Tensor


class Student(nn.Module):
    """Tower, projector, decoder and prompt projection of lisa-tiny, with the auxiliary heads of the training.

    `taught`: layers, from 1, whose first head is taught to attend from the mask query to the target.
    """

    def __init__(self, vocabulary: int, taught: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.taught = taught
        self.tower, self.heads = build_tower(), TowerHeads()
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.decoder: LlamaForCausalLM = build_decoder(vocabulary)
        self.mask_projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CHANNELS))
        self.pointer_queries = nn.ModuleList(nn.Linear(WIDTH, 96) for _ in (ANCHOR_TAP, *TAPS))
        self.pointer_keys = nn.Linear(WIDTH, 96)

    def image_tokens(self, features: Tensor, side: int) -> Tensor:
        """Projected features [B, side², width]; below the full grid they are averaged in squares."""
        if side < GRID:
            grid = features.transpose(1, 2).unflatten(2, (GRID, GRID))
            features = functional.avg_pool2d(grid, GRID // side).flatten(2).transpose(1, 2)
        return self.projector(features)

    def read(
        self, prompts: Prompts, image: Tensor, ids: Tensor, last: Tensor, short: bool, blind: bool = False
    ) -> Reading:
        """All queries of all images; `ids` and `last` as from `pack`."""
        head = torch.tensor([] if short else prompts.head, dtype=torch.long)
        tail = torch.tensor(prompts.tail[:1] if short else prompts.tail)
        taps = (ANCHOR_TAP, *TAPS)
        states, watched, shown = forward_packed(self.decoder, head, image, tail, ids, taps, blind, self.taught, last)
        index = last[..., None, None].expand(-1, -1, 1, states[0].shape[-1])
        queries = [state.gather(2, index)[:, :, 0] for state in states]
        keys = functional.layer_norm(self.pointer_keys(image), (96,))
        pointers = [
            probe(query) @ keys.transpose(1, 2) / 96**0.5
            for probe, query in zip(self.pointer_queries, queries, strict=True)
        ]
        return Reading(
            pointers, watched, self.mask_projection(queries[-1]), self.mask_projection(shown[-1]), states[-1]
        )


def pack(prompts: Prompts, texts: Sequence[Sequence[str]], short: bool, answer: bool = False) -> tuple[Tensor, Tensor]:
    """Ids [B, n, T] right-padded with 0 and the index of each mask query [B, n]; `answer` appends the answer's ids."""
    encode = prompts.short if short else prompts.query
    rows = [[encode(text) for text in row] for row in texts]
    length = max(len(ids) for row in rows for ids in row) + (len(prompts.answer) if answer else 0)
    packed = np.zeros((len(rows), len(rows[0]), length), dtype=np.int64)
    last = np.zeros(packed.shape[:2], dtype=np.int64)
    for i, row in enumerate(rows):
        for j, ids in enumerate(row):
            full = [*ids, *prompts.answer] if answer else ids
            packed[i, j, : len(full)] = full
            last[i, j] = len(ids) - 1
    return torch.from_numpy(packed), torch.from_numpy(last)


def answer_loss(student: Student, states: Tensor, ids: Tensor, last: Tensor, count: int) -> Tensor:
    """Next-token loss of the answer's `count` tokens."""
    steps = last[..., None] + torch.arange(count)
    read = states.gather(2, steps[..., None].expand(-1, -1, -1, states.shape[-1]))
    wanted = ids.gather(2, steps + 1)
    return functional.cross_entropy(student.decoder.lm_head(read).float().flatten(0, 2), wanted.flatten())


def token_counts(labels: np.ndarray, side: int) -> np.ndarray:
    """How many pixels of every label each image token shows, [B, side², 11]."""
    _, counts = patch_labels(labels)
    step = GRID // side
    return counts.reshape(len(labels), side, step, side, step, -1).sum((2, 4)).reshape(len(labels), side * side, -1)


def pointer_targets(labels: np.ndarray, targets: Sequence[Sequence[Any]], side: int) -> Tensor:
    """Share of each target's pixels in each image token, float32 [B, n, side²]."""
    counts = token_counts(labels, side)
    chosen = [counts[i][:, [item.label for item in row]].T for i, row in enumerate(targets)]
    wanted = torch.from_numpy(np.stack(chosen).astype(np.float32))
    return wanted / wanted.sum(-1, keepdim=True)


def anchor_targets(
    labels: np.ndarray, scenes: Sequence[Sequence[Any]], texts: Sequence[Sequence[str]], side: int
) -> tuple[Tensor, Tensor]:
    """Which queries have an anchor, bool [B, n], and for those the share of the anchor's pixels in each image token,
    float32 [k, side²]."""
    anchors = [[anchor_of(text, objects) for text in row] for row, objects in zip(texts, scenes, strict=True)]
    related = torch.tensor([[item is not None for item in row] for row in anchors])
    filled = [[item or objects[0] for item in row] for row, objects in zip(anchors, scenes, strict=True)]
    return related, pointer_targets(labels, filled, side)[related]


def own_targets(labels: np.ndarray, scenes: Sequence[Sequence[Any]], side: int) -> tuple[Tensor, Tensor]:
    """Which image tokens show an object, bool [B, side²], and for those SAM's encoding of its centre, [k, channels]."""
    counts = token_counts(labels, side)[:, :, 1:]
    inside = torch.from_numpy(counts.max(-1) >= (IMAGE_SIZE // side) ** 2 // 8)
    best = counts.argmax(-1) + 1
    points = np.take_along_axis(np.stack([centres(objects) for objects in scenes]), best[:, :, None], axis=1)
    return inside, encode_points(torch.from_numpy(points))[inside]


def prompt_targets(sam: SamModel, labels: np.ndarray, targets: Sequence[Sequence[Any]]) -> Tensor:
    """SAM's own embedding of the point that stands for each target, [B, n, channels]."""
    points = [[canonical_point(labels[i], item) for item in row] for i, row in enumerate(targets)]
    with torch.no_grad():
        return point_prompts(sam, torch.tensor(points, dtype=torch.float32))
