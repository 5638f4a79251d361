"""DeepStack (Meng et al., arXiv 2406.04334): visual features that are added to the image tokens after early layers.

Such decoders of transformers take features and a mask of their positions, and add the features between layers at full
length: `deepstack_visual_embeds` after the first layers, one after the other, with `visual_pos_masks`; or
`deepstack_features` before the layers with these numbers, with `vision_mask`. The engine removes these arguments from
the call and adds the features to the remaining tokens. The decoder itself adds those before its first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.engine.sequence.gathered import GatheredSequence


@dataclass(frozen=True)
class DeepStack:
    """Features that are added after layers.

    Attributes:
        where: bool [batch, S], positions with features.
        features: by layer, [number of such positions, width].
    """

    where: Tensor
    features: dict[int, Tensor]

    @classmethod
    def take(cls, kwargs: dict[str, Any], layers: int) -> DeepStack | None:
        """Remove the features from the keyword arguments of a decoder of so many layers, in place; None without any."""
        after, before = kwargs.get("deepstack_visual_embeds"), kwargs.get("deepstack_features")
        if after is not None:
            kwargs["deepstack_visual_embeds"] = None
            return cls(kwargs["visual_pos_masks"], dict(enumerate(after)))
        if before is None:
            return None
        kwargs["deepstack_features"] = {layer: features for layer, features in before.items() if layer == 0}
        later = {layer - 1: features for layer, features in before.items() if 0 < layer < layers}
        return cls(kwargs["vision_mask"][..., 0], later)

    def add(self, layer: int, hidden: Tensor, frame: GatheredSequence | None) -> Tensor:
        """A layer's output [batch, S or M, width] with its features added to the tokens that it ran on."""
        if layer not in self.features:
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
