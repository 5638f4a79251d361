"""LLaVA's projector from tower to decoder: one linear layer, or several with GELU in between."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint, Part

PROJECTOR = "model.mm_projector."


class ProjectorPlan:
    """The structure of a checkpoint's projector, found from its tensors before the decoder's width is known.

    Args:
        checkpoint: contains its tensors under `prefix`.
        config: config.json; its `mm_projector_type`, if any, must be `linear` or `mlp…x_gelu` and match the tensors.
        prefix: prefix of the tensors' names.

    Attributes:
        reads: width of the tower's features.
        depth: number of linear layers.

    Raises:
        CheckpointError: the projector is of another type, or config.json does not match the tensors.
    """

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any], prefix: str = PROJECTOR) -> None:
        names = [name.removeprefix(prefix) for name in checkpoint.names() if name.startswith(prefix)]
        places = [int(found[1]) for name in names if (found := re.fullmatch(r"(\d+)\.weight", name))]
        # With GELU in between, linear layers have even indices in their nn.Sequential.
        places = list(range(0, max(places, default=-1) + 1, 2))
        self.prefix, self.depth = prefix, len(places) or 1
        kind = str(config.get("mm_projector_type") or "")
        depth = _depth_of(kind)
        if kind and depth is None:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json says mm_projector_type {kind!r}, expected 'linear' or 'mlp2x_gelu' "
                "(any number of layers); other projectors are not supported"
            )
        if depth is not None and depth != self.depth and names:
            layers = "1 linear layer" if self.depth == 1 else f"{self.depth} linear layers"
            raise CheckpointError(
                f"{checkpoint.folder}/config.json says mm_projector_type {kind!r}, but the weights contain a projector "
                f"of {layers}; use the config.json that belongs to them"
            )
        self._shapes = [checkpoint.shape(f"{prefix}{place}.weight", dims=2) for place in places]
        single = checkpoint.shape(f"{prefix}weight", dims=2) if not places else self._shapes[0]
        self.reads = single[1]

    def part(self, width: int) -> Part[Any]:
        """The module on the meta device, for a decoder of this width, and the names of its tensors."""
        with torch.device("meta"):
            if not self._shapes:
                module: nn.Module = nn.Linear(self.reads, width)
            else:
                widths = [self.reads, *(shape[0] for shape in self._shapes[:-1]), width]
                layers: list[nn.Module] = []
                for inputs, outputs in pairwise(widths):
                    layers += [nn.Linear(inputs, outputs), nn.GELU()]
                module = nn.Sequential(*layers[:-1])
        return Part(module, {name: self.prefix + name for name in module.state_dict()})


def _depth_of(kind: str) -> int | None:
    if kind == "linear":
        return 1
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    return int(found[1]) if found else None
