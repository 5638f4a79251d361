"""VScan's options: numbers of tokens, the authors' two variants, and what a budget moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import Field

from tokenprune import Shape, Strategy, StrategyOptions
from tokenprune.core.budget import Ladder
from tokenprune.core.options import QUERY, QUERY_REDUCE, Amount, Depth, QueryReduce, tokens_of
from tokenprune.core.reads import ClsAttention
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.falling_stages import Counts, falling, falling_ladders

Variant = Literal["llava", "qwen"]
WINDOWS = 16  # of the authors' grid for LLaVA


class TwoVariants(Strategy):
    """Base of `vscan`."""

    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of VScan."""

        keep: Annotated[tuple[Amount, ...], Field(min_length=2)] = Field(
            (0.167, 0.0556),
            description="image tokens after the tower and from each of `layers` on: number (int) or share of N (float)",
        )
        layers: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
            (0.5,), description="first layer of each later stage: layer (int) or share of the depth (float)"
        )
        variant: Variant | None = Field(
            None,
            description="the authors' variant: llava, for towers with a [CLS], or qwen; by default as the tower is",
        )
        shallow: Depth = Field(
            0.21875, description="tower layer of the local scan: layer (int) or share of the tower's depth (float)"
        )
        query: str = Field("mask_query", description=QUERY)
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        positions: Positions | None = Field(
            None,
            description="position policy: renumber or keep; by default as in the authors' code: renumber with llava, "
            "keep with qwen",
        )
        faithful: bool = Field(
            False,
            description="as in the authors' code: the query is the last row, shares of N are truncated as floats, and "
            "with llava the tokens that do not divide by the windows are lost",
        )

    options: Options

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        # that of the stages depends on the tower if neither is set
        self.positions = self.options.positions or ("keep" if self.options.variant == "qwen" else "renumber")
        if len(self.options.keep) != len(self.options.layers) + 1:
            raise OptionError(
                f"strategy {self.name!r}: options 'keep' and 'layers': found {len(self.options.keep)} and "
                f"{len(self.options.layers)} values, expected one of each per layer, and a first one for the tower"
            )

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        faithful = dict.fromkeys(("query", "query_reduce"), "with faithful=True, where the query is the last row")
        return faithful if self.options.faithful else {}

    def variant(self, shape: Shape) -> Variant:
        """The option, or the variant for the model's tower."""
        return self.options.variant or ("llava" if shape.offers(ClsAttention) else "qwen")

    def shallow_layer(self, tower_layers: int) -> int:
        """The tower layer of the local scan; a tower of unknown depth counts as the authors' first (24 layers)."""
        depth = self.options.shallow
        return int(depth * (tower_layers or 24) + 0.5) if isinstance(depth, float) else depth

    def amounts(self, total: int) -> Counts:
        """The option `keep` in tokens, of `total`. Raises OptionError for numbers that grow."""
        cut = self.options.faithful  # the authors' int(N · ratio)
        kept = [int(total * n) if cut and isinstance(n, float) else tokens_of(n, total) for n in self.options.keep]
        return falling(self.name, kept)

    def counts(self, total: int, variant: Variant) -> Counts:
        """Image tokens after each stage, of `total`."""
        kept = self.amounts(total)
        if not self.options.faithful or variant == "qwen":
            return kept
        # the half for the local scan is divided by the windows, and the remainder is lost
        return tuple(accumulate((kept[0] - kept[0] // 2 % WINDOWS, *kept[1:]), min))

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """T tokens after the tower, and T/3, T/9, … from each layer on (published: one layer, in the middle)."""
        total, steps = shape.image_tokens, range(len(self.options.keep))
        thirds = [tuple(max(1, n // 3**step) for step in steps) for n in range(total, 0, -1)]
        given = [self.amounts(total)] if "keep" in self.options.model_fields_set else thirds
        return falling_ladders(self, shape, given, least=0)
