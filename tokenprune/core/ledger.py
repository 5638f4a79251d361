"""The account of a prefill: how many tokens entered each decoder layer, and what scoring them cost.

It does not import torch, which `tokenprune flops` can do without until a strategy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LookAhead:
    """A layer's attention, computed ahead of it for a stage that begins at it; all numbers are per batch row.

    Attributes:
        keys: positions whose keys were projected.
        queries: positions whose queries were projected.
        values: positions whose values were projected, as a fused projection does although nothing needs them.
        scored: query rows whose attention was computed.
        reused: keys that the layer took from here instead of projecting them itself.
        before: keys in the KV cache that the scored rows saw as well, in a later turn.
    """

    keys: int
    queries: int
    values: int = 0
    scored: int = 0
    reused: int = 0
    before: int = 0


@dataclass(frozen=True)
class LayerEntry:
    """One decoder layer in prefill.

    Attributes:
        layer: 0-based number.
        image: active image tokens entering the layer, per batch row (merged tokens count as one each).
        other: all other real tokens entering it, per batch row.
        width: positions computed per row, including the filling of shorter rows and padding.
        scored_rows: query rows per batch row whose attention in this layer was read.
        ahead: for each time that this layer's attention was computed ahead, what was computed.
        cached: image tokens in its KV cache after the prefill, per batch row; None = all that entered it.
        before: positions per row that its KV cache contained before a later turn, fillers and padding included.
    """

    layer: int
    image: tuple[int, ...]
    other: tuple[int, ...]
    width: int
    scored_rows: int = 0
    ahead: tuple[LookAhead, ...] = ()
    cached: tuple[int, ...] | None = None
    before: int = 0

    @property
    def in_cache(self) -> tuple[int, ...]:
        """Image tokens in its KV cache after the prefill, per batch row."""
        return self.image if self.cached is None else self.cached


@dataclass(frozen=True)
class LaterTurn:
    """A later call with image tokens, added to the prefill's cache, that was not pruned.

    Attributes:
        image: image tokens added, per batch row.
        other: every other token added, per batch row.
    """

    image: tuple[int, ...]
    other: tuple[int, ...]


@dataclass(repr=False)
class Ledger:
    """Layer entries of one prefill, or of a later turn of a conversation: then its own tokens alone.

    Attributes:
        image_tokens: image tokens of each batch row before any pruning, N.
        other_tokens: every other real token of each row.
        entries: one per decoder layer, in order.
        sequence: positions of a row before any pruning, padding included; 0 = as many as the longest row has tokens.
        merge_weights: weights that merges applied to hidden states, over all rows (tokens after · tokens before).
        later_turns: images added after the prefill that were kept whole. All figures are without them.
    """

    image_tokens: tuple[int, ...]
    other_tokens: tuple[int, ...]
    entries: list[LayerEntry] = field(default_factory=list)
    sequence: int = 0
    merge_weights: int = 0
    later_turns: list[LaterTurn] = field(default_factory=list)

    def __repr__(self) -> str:
        """Rows, layers and totals, without the entries."""
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
        """The ledger of the same batch and layers without pruning and scoring, to compare with."""
        tokens = self.image_tokens, self.other_tokens, self.width
        entries = [LayerEntry(e.layer, *tokens, before=e.before) for e in self.entries]
        return Ledger(self.image_tokens, self.other_tokens, entries, self.sequence)

    @property
    def equivalent_tokens(self) -> float:
        """Mean over layers and rows of the image tokens *entering* the layer: the unit of budgets."""
        rows = [count for entry in self.entries for count in entry.image]
        return sum(rows) / len(rows) if rows else 0.0

    @property
    def equivalent_tokens_ratio(self) -> float:
        """Equivalent tokens over N (mean over rows); 1.0 without image tokens."""
        total = sum(self.image_tokens) / max(len(self.image_tokens), 1)
        return self.equivalent_tokens / total if total else 1.0


def _span(counts: tuple[int, ...]) -> str:
    """One number, or the smallest and the largest."""
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"
