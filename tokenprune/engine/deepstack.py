"""DeepStack (Meng et al., arXiv 2406.04334): visual features that are added to the image tokens after early layers.

Decoders of transformers that do so take `visual_pos_masks` and `deepstack_visual_embeds` and add them between their
layers, at full length. The engine takes them out of the call and adds them itself, to the tokens that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.engine.gathered import GatheredSequence


@dataclass(frozen=True)
class DeepStack:
    """Features that are added after each of the first layers.

    Attributes:
        where: bool [batch, S], the positions that get something.
        features: per layer, [number of such positions, width].
    """

    where: Tensor
    features: list[Tensor]

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> DeepStack | None:
        """Take it out of the decoder's keyword arguments, which are changed; None where there is none."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return None
        kwargs["deepstack_visual_embeds"] = None
        return cls(kwargs["visual_pos_masks"], list(features))

    def add(self, layer: int, hidden: Tensor, frame: GatheredSequence | None) -> Tensor:
        """The output [batch, S or M, width] of a layer with its features added; tokens that did not run get none."""
        if layer >= len(self.features):
            return hidden
        where, features = self.where.to(hidden.device), self.features[layer].to(hidden)
        if frame is not None:
            # features are listed for all marked positions in order: which of them does each position have?
            numbers = (where.flatten().cumsum(0) - 1).view_as(where)
            index = frame.index.to(hidden.device)
            numbers = numbers.gather(1, index)
            # a filler repeats a position, and would take its features a second time
            where = where.gather(1, index) & frame.filled.to(hidden.device)
            features = features[numbers[where]]
        result = hidden.clone()  # not in place: hooks and the backward pass hold the layer's output
        result[where] = hidden[where] + features
        return result
