"""How patches of a vision tower become image tokens in single families of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune_adapters.hf.arrangements.square_crops import Arrangement


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
