"""The record of a prefill, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.ledger import Ledger


@dataclass(frozen=True, repr=False)
class StageTrace:
    """The tokens after a stage's decision. All tensors are [batch, N] over the row's original image tokens.

    Attributes:
        name: stage name.
        layer: first layer that ran with this active set.
        kind: "keep", "park", "restore" or "merge".
        active, parked, dropped: bool.
        origin: int64, the original token whose place in the image a token has (not its own number if a method moved
            it); −1 for none.
        mass: float32, original tokens that each one stands for.
        scores: the scores behind the choice, or None.
        lineage: bool [batch, N, N], [b, k, j] = token j contributes to token k; None = each is only itself.
        rows: bool [batch], the rows that the stage is for; None = all. With a budget, rows of different sizes may have
            a stage of the same name at different layers.
    """

    name: str
    layer: int
    kind: str
    active: Tensor
    parked: Tensor
    dropped: Tensor
    origin: Tensor
    mass: Tensor
    scores: Tensor | None
    lineage: Tensor | None
    rows: Tensor | None = None

    def __repr__(self) -> str:
        """A summary without the tensors."""
        counts = (f"{_range(getattr(self, state).sum(1))} {state}" for state in ("active", "parked", "dropped"))
        batch, size = self.active.shape
        return f"StageTrace({self.name!r} at layer {self.layer}, {self.kind}: {', '.join(counts)}; [{batch}, {size}])"

    @property
    def kept(self) -> list[list[int]]:
        """Active image-token numbers per batch row, ascending."""
        return [row.nonzero().flatten().tolist() for row in self.active]

    def places(self) -> Tensor:
        """bool [batch, N]: the original tokens whose place in the image an active token has."""
        size = self.active.shape[1]
        index = torch.where(self.active & (self.origin >= 0), self.origin, size)
        spare = self.active.new_zeros(len(self.active), size + 1)
        return spare.scatter(1, index, True)[:, :size]


@dataclass(repr=False)
class Trace:
    """The record of a prefill.

    Attributes:
        strategy: text form of the strategy with the options that were used.
        policies: positions, query rows, padding: to be reported with every result.
        layout: where the image tokens stood.
        exists: bool [batch, N].
        ledger: tokens per layer.
        stages: in order; empty if there was no decision.
    """

    strategy: str
    policies: dict[str, str]
    layout: SequenceLayout
    exists: Tensor
    ledger: Ledger
    stages: list[StageTrace] = field(default_factory=list)

    def stages_of(self, row: int) -> list[StageTrace]:
        """The stages of one batch row."""
        return [stage for stage in self.stages if stage.rows is None or bool(stage.rows[row])]

    def __repr__(self) -> str:
        """The strategy, and a line for each of the first rows: see `summary`."""
        rows = len(self.exists)
        lines = [self.summary(row) for row in range(min(rows, 4))]
        if rows == 1:
            return f"Trace({self.strategy}: {lines[0]})"
        listing = [f"  row {row}: {line}" for row, line in enumerate(lines)] + ["  …"] * (rows > len(lines))
        return "\n".join((f"Trace({self.strategy}: {rows} rows", *listing)) + ")"

    def summary(self, row: int = 0) -> str:
        """A batch row in one line: image tokens by stage, and equivalent tokens."""
        total = int(self.exists[row].sum())
        stages = ", ".join(f"{int(stage.active[row].sum())} from layer {stage.layer}" for stage in self.stages_of(row))
        entered = [entry.image[row] for entry in self.ledger.entries]
        equivalent = sum(entered) / len(entered) if entered else 0.0
        share = f" ({equivalent / total:.1%})" if total else ""
        return f"{total} image tokens, {stages or 'all in every layer'}; {equivalent:.1f} equivalent tokens{share}"

    def active(self, layer: int) -> Tensor:
        """bool [batch, N]: image tokens that took part in a decoder layer."""
        present = self.exists
        for stage in self.stages:
            if stage.layer <= layer:
                present = stage.active
        return present


def _range(counts: Tensor) -> str:
    """One number, or the smallest and the largest."""
    low, high = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
    return str(low) if low == high else f"{low}–{high}"
