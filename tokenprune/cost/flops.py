"""FLOPs of a prefill in the literature's two conventions and in an exact one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from tokenprune.core.ledger import LayerEntry, Ledger
from tokenprune.cost.spec import DecoderSpec
from tokenprune.errors import InputError, OptionError

Convention = Literal["exact", "fastv", "pdrop"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
Count = Literal["all", "image"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, by part, all batch rows together.

    Attributes:
        convention: how they were counted; conventions cannot be compared with each other.
        by_layer: every decoder layer, without scoring.
        scorer: attention rows that were computed for strategies only, with the projections ahead of a layer that the
            layer did not use.
        merge: weighted sums of hidden states.
        lm_head: the output projection, at the positions it ran on.
        fixed: parts that do not depend on pruning, by name (tower, projector, mask head).
    """

    convention: Convention
    by_layer: tuple[int, ...]
    scorer: int = 0
    merge: int = 0
    lm_head: int = 0
    fixed: Mapping[str, int] = field(default_factory=dict)

    @property
    def decoder(self) -> int:
        """All decoder layers."""
        return sum(self.by_layer)

    @property
    def per_layer(self) -> float:
        """Mean over the decoder layers."""
        return self.decoder / len(self.by_layer)

    @property
    def parts(self) -> dict[str, int]:
        """Every part by name; they sum to `total`."""
        own = ("decoder", "scorer", "merge", "lm_head")
        return {**{name: getattr(self, name) for name in own}, **self.fixed}

    @property
    def total(self) -> int:
        """Everything."""
        return sum(self.parts.values())

    def ratio(self, to: Flops) -> float:
        """This total over another's, 1.0 meaning no saving.

        Raises:
            InputError: counted in another convention, or the other is zero.
        """
        if self.convention != to.convention:
            raise InputError(
                f"FLOPs: cannot compare convention {self.convention!r} with {to.convention!r}; use the same for both"
            )
        if to.total == 0:
            raise InputError("FLOPs: cannot take a ratio to zero FLOPs; compare with a run that has tokens")
        return self.total / to.total


def count_flops(
    ledger: Ledger,
    spec: DecoderSpec,
    convention: Convention = "exact",
    *,
    count: Count | None = None,
    logit_positions: int = 0,
    fixed: Mapping[str, int] | None = None,
) -> Flops:
    """FLOPs of a forward pass, from its ledger.

    Conventions, for n tokens in a layer, hidden size d and MLP size m:

    - `fastv`: 4nd² + 2n²d + 2ndm, 1 per multiply-add (FastV, arXiv 2403.06764, section 4.1). Counts all real tokens.
    - `pdrop`: 4nd² + 2n²d + 3ndm, 1 per multiply-add (PyramidDrop, arXiv 2410.17247). Counts image tokens only.
    - `exact` (ours): 2 per multiply-add, every matmul that runs: q, k, v, o with grouped heads, QKᵀ and PV over
      the full width (fillers and padding included, the causal half not taken off, as attention kernels are
      conventionally counted; keys of earlier turns included), the MLP, `lm_head`, scored attention rows, merges of
      states, and the fixed parts. Equals
      `torch.utils.flop_counter` on a real run (see `flop_counter` for its one gap, `ChoiceMeter` for matmuls inside a
      strategy). The engine's own bookkeeping is not counted.

    Args:
        ledger: of a run, or from `declared_ledger`.
        spec: the decoder's sizes.
        convention: see above.
        count: "all" real tokens or "image" tokens only, for the two literature conventions; default as stated above.
        logit_positions: positions per batch row that `lm_head` runs on: 0 for a decoder alone, 1 for the prefill of
            generation, the sequence width for a plain forward of a causal language model. `exact` only.
        fixed: FLOPs of parts outside the decoder for all rows together, by name (see `measure_flops`). `exact` only.

    Raises:
        OptionError: an unknown convention or `count`, or `count` together with `exact`.
        InputError: the ledger and the spec disagree on the number of layers.
    """
    if convention not in CONVENTIONS:
        raise OptionError(f"FLOPs convention: {convention!r} found, expected one of {', '.join(CONVENTIONS)}")
    if count is not None and (convention == "exact" or count not in get_args(Count)):
        raise OptionError(
            f"FLOPs: count={count!r} found; give 'all' or 'image', and only with conventions 'fastv' and 'pdrop'"
        )
    if len(ledger.entries) != spec.layers:
        raise InputError(
            f"ledger: {len(ledger.entries)} layers found, expected {spec.layers} as in the decoder's sizes; "
            "a prefill must have run to its end with this very decoder"
        )
    if convention == "exact":
        return _exact(ledger, spec, logit_positions, dict(fixed or {}))
    matrices = 2 if convention == "fastv" else 3
    which = count or ("all" if convention == "fastv" else "image")
    by_layer = tuple(sum(_published(n, spec, matrices) for n in _tokens(entry, which)) for entry in ledger.entries)
    return Flops(convention, by_layer)


def _published(n: int, spec: DecoderSpec, mlp_matrices: int) -> int:
    d, m = spec.hidden, spec.intermediate
    return 4 * n * d * d + 2 * n * n * d + mlp_matrices * n * d * m


def _tokens(entry: LayerEntry, which: Count) -> list[int]:
    if which == "image":
        return list(entry.image)
    return [image + other for image, other in zip(entry.image, entry.other, strict=True)]


def _exact(ledger: Ledger, spec: DecoderSpec, logit_positions: int, fixed: dict[str, int]) -> Flops:
    rows, attention = len(ledger.image_tokens), spec.heads * spec.head_dim
    queries, keys = spec.hidden * attention, spec.hidden * spec.kv_heads * spec.head_dim
    projections = 2 * (queries + keys)
    mlp = (3 if spec.gated_mlp else 2) * spec.hidden * spec.intermediate
    by_layer = tuple(
        rows * (2 * entry.width * (projections + mlp) + 4 * entry.width * (entry.before + entry.width) * attention)
        for entry in ledger.entries
    )
    scorer = sum(2 * rows * entry.scored_rows * (entry.before + entry.width) * attention for entry in ledger.entries)
    for entry in ledger.entries:
        for ahead in entry.ahead:  # a layer that takes its keys from there is itself counted in full
            projected = ahead.queries * queries + (ahead.keys + ahead.values - ahead.reused) * keys
            scorer += 2 * rows * (projected + ahead.scored * (ahead.before + ahead.keys) * attention)
    merge = 2 * ledger.merge_weights * spec.hidden
    lm_head = 2 * rows * logit_positions * spec.hidden * spec.vocab
    return Flops("exact", by_layer, scorer, merge, lm_head, fixed)
