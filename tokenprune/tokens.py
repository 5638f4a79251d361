"""The view of the image tokens that a strategy chooses from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PluginError
from tokenprune.reads import Read


class Tokens:
    """The image tokens of every batch row on entering a stage.

    The token axis is always the *original* image tokens of the row, 0 … N−1 in sequence order, so a number means the
    same token in every stage. Rows with fewer than N tokens are padded at the end (`exists` is False there).

    Attributes:
        exists: bool [batch, N].
        active: bool [batch, N], taking part in the layer before this stage.
        parked: bool [batch, N], not active, can be restored.
        counts: int64 [batch], original image tokens per row.
        target: int64 [batch], the number the stage declared, −1 where it declared none.
        image: int64 [batch, N], image number within the row.
        grid: int64 [batch, N, 2], (row, column) of the cell, −1 where there is none.
        mass: float32 [batch, N], how many original tokens each stands for.
        memory: a dict that lives as long as this run, to carry things from stage to stage.

    What the stage declared in `reads` is here as an attribute too: `attention`, `hidden`, `features`, … (see
    `tokenprune.reads`). Reading what was not declared raises PluginError.
    """

    def __init__(
        self,
        *,
        stage: str,
        exists: Tensor,
        active: Tensor,
        parked: Tensor,
        target: Tensor,
        image: Tensor,
        grid: Tensor,
        mass: Tensor,
        memory: dict[str, Any],
        seed: int = 0,
        fetch: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self.exists, self.active, self.parked = exists, active, parked
        self.counts = exists.sum(1)
        self.target, self.image, self.grid, self.mass, self.memory = target, image, grid, mass, memory
        self._stage, self._seed, self._fetch = stage, seed, dict(fetch or {})
        self._read: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._fetch:
            known = {kind.field: kind.__name__ for kind in Read.__subclasses__()}
            if name not in known:
                raise AttributeError(f"Tokens has no attribute {name!r}")
            raise PluginError(
                f"stage {self._stage!r} reads tokens.{name} without declaring it; add {known[name]}() to the "
                "stage's reads"
            )
        if name not in self._read:
            self._read[name] = self._fetch[name]()
        return self._read[name]

    @property
    def device(self) -> torch.device:
        """The device on which indices and scores must be."""
        return self.active.device

    def count(self, share: float) -> Tensor:
        """int64 [batch]: floor(share · N_row), at least 1 where share > 0 and the row has image tokens."""
        number = (self.counts * share + 1e-6).floor().long()
        return torch.where(self.counts > 0, number.clamp(min=1 if share > 0 else 0), 0)

    def generator(self, seed: int = 0) -> torch.Generator:
        """A fresh CPU random generator from the option `seed` and the run's own seed.

        Make one per row, so that a row in a batch draws what it would draw alone.
        """
        return torch.Generator().manual_seed(hash((seed, self._seed)) & 0x7FFF_FFFF_FFFF_FFFF)
