"""How patches of a vision tower become image tokens in single families of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.engine.reads.attention_tap import AttentionCall
from tokenprune_adapters.hf.grid_cells import Cells
from tokenprune_adapters.hf.token_layouts import Arrangement


class Paired(Arrangement):
    """DeepSeek-VL hybrid: the projector takes the states of two towers, of which the first is read."""

    def given(self, states: Tensor, *others: Tensor) -> Tensor:
        """The states of both towers concatenated."""
        return torch.cat((states, *others), -1)

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """Project the states of both towers."""
        width = projector.vision_proj.in_features
        projected: Tensor = projector(features[..., :width], features[..., width:])
        return projected


class Words(Arrangement):
    """Ovis2: k × k patches are projected to a distribution over visual words, whose embeddings are mixed.

    Checkpoints that draw a word at random are projected to the likeliest one.
    """

    @classmethod
    def embed(cls, base: Any, projected: Tensor) -> Tensor:
        """Mix the embeddings of the words."""
        scores = base.vision_tower.head_norm(projected)
        if base.config.vision_config.tokenize_function == "softmax":
            words = scores.softmax(-1)
        else:
            words = functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        embedded: Tensor = words @ base.visual_embeddings_table.weight[: words.shape[-1]]
        return embedded


class Unfolded(Arrangement):
    """LightOnOCR: images of any size in one sequence, row by row; m × m patches become a token.

    A last row or column of fewer patches is in no token.
    """

    def split(self, call: AttentionCall) -> list[AttentionCall]:
        """One call for each image, as each attends to itself alone."""
        counts = [rows * columns for rows, columns in self._shapes()]
        parts = [getattr(call, name).split(counts, 2) for name in ("query", "key", "value")]
        return [replace(call, query=q, key=k, value=v, mask=None) for q, k, v in zip(*parts, strict=True)]

    def cells(self, tokens: int, crops: int) -> Cells:
        """As many cells as tokens."""
        m = self.base.config.spatial_merge_size
        return Cells.joined([Cells.lines(rows // m, columns // m) for rows, columns in self._shapes()])

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the patches of a token."""
        return self._tokens(torch.cat([value.flatten(0, -2) for value in values])).mean(1)

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The patches of a token concatenated: [tokens, m · m · C]."""
        return self._tokens(torch.cat([part.flatten(0, -2) for part in given])).flatten(1)

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """Project with the projector, whose input is an image for each token."""
        batch, count, _ = features.shape
        side = projector.patch_merger.patch_size * projector.patch_merger.spatial_merge_size
        patches = features.reshape(-1, len(projector.norm.weight))
        projected: Tensor = projector(patches, [(side, side)] * (batch * count))
        return projected.view(batch, count, -1)

    def _tokens(self, patches: Tensor) -> Tensor:
        """[P, C] to [tokens, m · m, C]."""
        m, shapes, width = self.base.config.spatial_merge_size, self._shapes(), patches.shape[-1]
        parts = torch.split(patches, [rows * columns for rows, columns in shapes])
        grids = [part.view(*shape, width) for part, shape in zip(parts, shapes, strict=True)]
        squares = [grid.unfold(0, m, m).unfold(1, m, m).reshape(-1, width, m * m) for grid in grids]
        return torch.cat(squares).transpose(1, 2)

    def _shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of patches of each image."""
        side = self.base.config.vision_config.patch_size
        return [(int(height) // side, int(width) // side) for height, width in self.inputs["image_sizes"]]
