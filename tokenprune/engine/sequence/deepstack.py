"""DeepStack (Meng et al., arXiv 2406.04334): visual features that are added to the image tokens after early layers.

Such decoders of transformers take `visual_pos_masks` and `deepstack_visual_embeds`, and add the features between layers
at full length. The engine removes these arguments from the call and adds the features to the remaining tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.engine.sequence.gathered import GatheredSequence


@dataclass(frozen=True)
class DeepStack:
    """Features that are added after each of the first layers.

    Attributes:
        where: bool [batch, S], positions with features.
        features: per layer, [number of such positions, width].
    """

    where: Tensor
    features: list[Tensor]

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> DeepStack | None:
        """Remove the features from the decoder's keyword arguments, in place; None if there are none."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return None
        kwargs["deepstack_visual_embeds"] = None
        return cls(kwargs["visual_pos_masks"], list(features))

    def add(self, layer: int, hidden: Tensor, frame: GatheredSequence | None) -> Tensor:
        """A layer's output [batch, S or M, width] with its features added to the tokens that it ran on."""
        if layer >= len(self.features):
            return hidden
        where, features = self.where.to(hidden.device), self.features[layer].to(hidden)
        if frame is not None:
            # number of each marked position, to index the list of features
            numbers = (where.flatten().cumsum(0) - 1).view_as(where)
            index = frame.index.to(hidden.device)
            numbers = numbers.gather(1, index)
            # a filler repeats a position and must not consume its features
            where = where.gather(1, index) & frame.filled.to(hidden.device)
            features = features[numbers[where]]
        result = hidden.clone()  # not in place: hooks and the backward pass refer to the layer's output
        result[where] = hidden[where] + features
        return result
