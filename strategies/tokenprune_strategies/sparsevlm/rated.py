"""The common part of both versions of SparseVLM: raters, published counts, stages, budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenprune import Decision, Embeddings, Keep, Read, Shape, Stage, Strategy, StrategyOptions, TextEmbeddings, Tokens
from tokenprune.core.budget import Ladder
from tokenprune.core.options import COMPACT, Amount, Depth, tokens_of
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.ops.falling_stages import Counts, falling_ladders, layers_of
from tokenprune_strategies.sparsevlm.rating import RATERS, raters
from tokenprune_strategies.sparsevlm.recycling import Cut, Pruning, cuts

TOTAL, LEAST_SHARE = 576, 0.0625


class RatedByText(Strategy):
    """Base of both versions: raters are marked before layer 0, then stages keep the tokens that they rate highest."""

    budget_option = "keep"
    tables: ClassVar[dict[int, Counts]]
    recycles: ClassVar[bool]

    class Options(StrategyOptions):
        """Options of both versions."""

        table: Literal[192, 128, 96, 64] = Field(
            192, description="published numbers of tokens to keep at the three stages, of 576, by their budget"
        )
        keep: tuple[Amount, ...] | None = Field(
            None,
            description="image tokens to keep at each stage, without merged ones: number (int) or share (float); "
            "overrides `table`",
        )
        layers: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
            (0.09375, 0.21875, 0.5),
            description="first layer without the dropped tokens of each stage: layer (int) or share of the depth "
            "(float)",
        )
        positions: Positions = Field("renumber", description=COMPACT)
        faithful: bool = Field(False, description="as in the authors' code")

    options: Any

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=budget, **options)
        amounts, layers = self.options.keep or self.tables[self.options.table], self.options.layers
        if len(layers) != len(amounts):
            raise OptionError(
                f"strategy {self.name!r}: option 'layers': found {len(layers)} for {len(amounts)} stages, expected one "
                "layer, and one value of 'keep', per stage"
            )

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        return {"table": "with keep"} if self.options.keep is not None else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Rating before layer 0, then the stages that prune. Raises IncompatibleError if the model is unsuitable."""
        layers, total = layers_of(self.options.layers, shape.layers, self.name), shape.image_tokens
        yield Stage("rate", 0, total, (Embeddings(), TextEmbeddings()))
        for number, (layer, cut) in enumerate(zip(layers, self.cuts(self.counts(total), total), strict=True), 1):
            yield Pruning(f"prune {number}", layer, cut.rows, self.reads(), cut=cut)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Mark the raters, then prune by their ratings."""
        if stage.name != "rate":
            return self.pruned(stage, tokens)
        tokens.mark(RATERS, raters(tokens))
        return Keep.where(tokens.active)

    @abstractmethod
    def reads(self) -> tuple[Read, ...]:
        """The reads of a stage that prunes."""

    @abstractmethod
    def pruned(self, stage: Stage, tokens: Tokens) -> Decision:
        """The decision at a stage that prunes."""

    def counts(self, total: int) -> Counts:
        """Number of tokens to keep at each stage, of `total`: `keep`, or the table as shares of 576 (ours)."""
        if self.options.keep is not None:
            return tuple(tokens_of(keep, total) for keep in self.options.keep)
        return tuple(max(1, count * total // TOTAL) for count in self.tables[self.options.table])

    def cuts(self, counts: Counts, total: int) -> list[Cut]:
        """The numbers that the stages keep and merge."""
        return cuts(counts, total, recycles=self.recycles, always=self.options.faithful)

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """`keep` in the proportions of the table; merged tokens count towards the budget (ours).

        If the first stage would keep less than N/16, the layers of all stages are scaled down towards layer 1.
        """
        total, table = shape.image_tokens, self.tables[self.options.table]
        scaled = [tuple(max(1, first * count // table[0]) for count in table) for first in range(total, 0, -1)]
        given = scaled if self.options.keep is None else [self.counts(total)]
        return falling_ladders(self, shape, given, LEAST_SHARE)
