"""Tokens with long values stay; of the others some are set aside and given back later, the rest is merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch.nn.functional import normalize, one_hot

from tokenprune import LayerRead, LayerValues, Merge, MergeGroup, Restore, Stage, Strategy, StrategyOptions
from tokenprune.core.options import Amount, layer_of, tokens_of


@dataclass(frozen=True)
class ValueNorms(LayerRead):
    """`tokens.value_norms`: float32 [batch, N], length of each token's value in the layer before, mean over heads."""

    field = "value_norms"

    def value(self, layer):
        """See `LayerRead.value`."""
        return layer.of_image(layer.value.float().norm(dim=-1).mean(1))


class SecondLook(Strategy):
    """Keep the image tokens with the longest values, set the next ones aside, merge each other token into the kept one
    of the most similar value; later those that were set aside return."""

    name = "second-look"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of `second-look`."""

        keep: Amount = Field(0.25, description="number (int) or share (float) of image tokens that stay")
        aside: float = Field(0.1, ge=0, lt=1, description="share of the image tokens that is set aside")
        layer: int = Field(2, ge=1, description="first layer without the merged tokens")

    def stages(self, shape):
        """Merge at `layer`, restore at half of the depth, or one layer later."""
        keep = tokens_of(self.options.keep, shape.image_tokens)
        layer = layer_of(self.options.layer, shape.layers - 1, self.name, least=1)
        yield Stage("merge", layer, keep, (ValueNorms(), LayerValues()))
        yield Stage("return", max(layer + 1, shape.layers // 2), keep + self.aside(shape.image_tokens, keep))

    def aside(self, total, keep):
        """How many of a row's tokens are set aside."""
        return min(round(self.options.aside * total), total - keep)

    def choose(self, stage, tokens):
        """Merge, or restore."""
        if stage.name == "return":
            return Restore.where(tokens.parked)
        groups = []
        for images in tokens.images_by_row():
            if not images:
                continue
            row, keep = images[0].row, sum(image.quota for image in images)
            index = torch.cat([image.index for image in images])
            order = index[tokens.value_norms[row, index].argsort(descending=True, stable=True)]
            kept, merged = order[:keep], order[keep + self.aside(len(index), keep) :]
            values = normalize(tokens.layer_values[row].float(), dim=-1)
            nearest = (values[merged] @ values[kept].T).argmax(1) if keep else merged[:0]
            into = torch.cat((torch.arange(keep, device=tokens.device), nearest))
            weights = one_hot(into, max(keep, 1)).float().T[:keep]
            members = torch.cat((kept, merged[: len(nearest)]))
            groups.append(MergeGroup(row, kept, members, weights / weights.sum(1, keepdim=True)))
        return Merge.from_groups(tokens, groups, rest="park")
