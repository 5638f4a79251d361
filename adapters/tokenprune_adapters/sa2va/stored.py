"""Tensors that a checkpoint stores joined, and transformers apart, or the other way round."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune_adapters.common.checkpoint import Checkpoint

FUSED = re.compile(r"(vision_model\..*\.attn)\.qkv\.(weight|bias)")
POINTS = re.compile(r"(.*\.sam_prompt_encoder\.point_embeddings)\.(\d+)\.weight")
PARTS = ("q", "k", "v")


class Rearranged(Checkpoint):
    """A checkpoint in which the tower's fused queries, keys and values are three tensors, and SAM 2's embeddings of
    points are one table.

    `attn.qkv.weight` becomes `attn.qkv.q.weight`, and so on; `point_embeddings.0.weight`
    and those that follow it become `point_embeddings.weight`. All other tensors stay as they are.

    Args:
        stored: the checkpoint.
    """

    def __init__(self, stored: Checkpoint) -> None:  # reads nothing itself
        self.folder, self._stored = stored.folder, stored
        self._made: dict[str, tuple[list[str], int | None]] = {}
        for name in stored.names():
            if fused := FUSED.fullmatch(name):
                for number, part in enumerate(PARTS):
                    self._made[f"{fused[1]}.qkv.{part}.{fused[2]}"] = ([name], number)
            elif point := POINTS.fullmatch(name):
                self._made.setdefault(f"{point[1]}.weight", ([], None))[0].append(name)
            else:
                self._made[name] = ([name], None)
        for sources, _ in self._made.values():
            sources.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])

    def __contains__(self, name: str) -> bool:
        return name in self._made

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return list(self._made)

    def shape(self, name: str, dims: int | None = None) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        sources, part = self._sources(name)
        first, *others = self._stored.shape(sources[0], dims)
        rows = sum(self._stored.shape(source)[0] for source in sources)
        return (rows // len(PARTS) if part is not None and first % len(PARTS) == 0 else rows, *others)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        sources, part = self._sources(name)
        found = [self._stored.tensor(source) for source in sources]
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole if part is None else whole.chunk(len(PARTS))[part].clone()  # frees the other parts

    def _sources(self, name: str) -> tuple[Sequence[str], int | None]:
        return self._made.get(name, ([name], None))  # what is missing, the checkpoint refuses
