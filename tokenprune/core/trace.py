"""What a run did, for reading afterwards: stage by stage the trace, layer by layer the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.core.layout import SequenceLayout


@dataclass(frozen=True)
class LayerEntry:
    """One decoder layer in prefill.

    Attributes:
        layer: 0-based number.
        image: active image tokens entering the layer, per batch row (merged tokens count as one each).
        other: every other real token entering it, per batch row.
        width: positions really computed per row, fillers of shorter rows and padding included.
        scored_rows: query rows per batch row whose attention was read out of this layer.
        ahead: (positions, query rows) per batch row of every time that this layer's attention was computed ahead for a
            stage that begins with it.
    """

    layer: int
    image: tuple[int, ...]
    other: tuple[int, ...]
    width: int
    scored_rows: int = 0
    ahead: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LaterTurn:
    """Tokens with images among them that a later call added to the prefill's cache. All layers keep them whole.

    Attributes:
        image: image tokens added, per batch row.
        other: every other token added, per batch row.
    """

    image: tuple[int, ...]
    other: tuple[int, ...]


@dataclass(repr=False)
class Ledger:
    """Layer entries of one prefill.

    Attributes:
        image_tokens: image tokens of each batch row before any pruning, N.
        other_tokens: every other real token of each row.
        entries: one per decoder layer, in order.
        sequence: positions of a row before any pruning, padding included; 0 = as many as the longest row has tokens.
        merge_weights: weights that merges applied to hidden states, all rows together (tokens after · tokens before).
        later_turns: images that came on top later. They are in none of the figures, which are the prefill's.
    """

    image_tokens: tuple[int, ...]
    other_tokens: tuple[int, ...]
    entries: list[LayerEntry] = field(default_factory=list)
    sequence: int = 0
    merge_weights: int = 0
    later_turns: list[LaterTurn] = field(default_factory=list)

    def __repr__(self) -> str:
        """Rows, layers and what they come to, without the entries."""
        rows = len(self.image_tokens)
        before = f"{rows} rows, " if rows != 1 else ""
        counts = [f"{_span(self.image_tokens)} image tokens", f"{_span(self.other_tokens)} others"]
        share = f"{self.equivalent_tokens:.1f} equivalent tokens ({self.equivalent_tokens_ratio:.1%})"
        return f"Ledger({before}{', '.join(counts)}; {len(self.entries)} layers, {share})"

    @property
    def width(self) -> int:
        """Positions of a row before any pruning."""
        longest = max(
            (image + other for image, other in zip(self.image_tokens, self.other_tokens, strict=True)), default=0
        )
        return max(self.sequence, longest)

    def unpruned(self) -> Ledger:
        """The same batch and layers with nothing pruned and nothing scored: what to compare with."""
        entries = [LayerEntry(e.layer, self.image_tokens, self.other_tokens, self.width) for e in self.entries]
        return Ledger(self.image_tokens, self.other_tokens, entries, self.sequence)

    @property
    def equivalent_tokens(self) -> float:
        """Mean over layers and rows of the image tokens *entering* the layer: what budgets are stated in."""
        rows = [count for entry in self.entries for count in entry.image]
        return sum(rows) / len(rows) if rows else 0.0

    @property
    def equivalent_tokens_ratio(self) -> float:
        """Equivalent tokens over N (mean over rows); 1.0 where there are no image tokens."""
        total = sum(self.image_tokens) / max(len(self.image_tokens), 1)
        return self.equivalent_tokens / total if total else 1.0


@dataclass(frozen=True, repr=False)
class StageTrace:
    """The tokens once a stage was entered. All tensors are [batch, N] over the row's original image tokens.

    Attributes:
        name: stage name.
        layer: first layer that ran with this active set.
        kind: "keep", "park", "restore" or "merge".
        active, parked, dropped: bool.
        origin: int64, the original token whose place in the image a token has (differs from its own number where a
            method moves tokens); −1 for none.
        mass: float32, original tokens that each stands for.
        scores: what the choice was made by, or None.
        lineage: bool [batch, N, N], [b, k, j] = token k carries something of token j; None = each carries itself.
        rows: bool [batch], the rows that the stage was for; None = all. A budget may begin a stage at another layer for
            rows of another size, which then have a stage of the same name there.
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
        """What happened, without the tensors."""
        counts = (f"{_range(getattr(self, state).sum(1))} {state}" for state in ("active", "parked", "dropped"))
        batch, size = self.active.shape
        return f"StageTrace({self.name!r} at layer {self.layer}, {self.kind}: {', '.join(counts)}; [{batch}, {size}])"

    @property
    def kept(self) -> list[list[int]]:
        """Active image-token numbers per batch row, ascending."""
        return [row.nonzero().flatten().tolist() for row in self.active]

    def places(self) -> Tensor:
        """bool [batch, N]: the original tokens whose place in the image is held by an active token."""
        size = self.active.shape[1]
        index = torch.where(self.active & (self.origin >= 0), self.origin, size)
        spare = self.active.new_zeros(len(self.active), size + 1)
        return spare.scatter(1, index, True)[:, :size]


@dataclass(repr=False)
class Trace:
    """A whole prefill.

    Attributes:
        strategy: text form of the strategy with the options that really ran.
        policies: positions, query rows, padding: what has to be told with every result.
        layout: where the image tokens stood.
        exists: bool [batch, N].
        ledger: tokens per layer.
        stages: in order; empty where nothing was ever decided.
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
        """What a batch row went through, in one line: image tokens by stage, and equivalent tokens."""
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
    """One number, or the least and the most of several."""
    low, high = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
    return str(low) if low == high else f"{low}–{high}"


def _span(counts: tuple[int, ...]) -> str:
    """One number, or the least and the most of several."""
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"
