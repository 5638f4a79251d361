"""What a strategy declares: the stages of a run; and what it knows about the run before it starts.

Examples:
    Positions are a policy of a strategy, or of a stage:

    >>> import typing, tokenprune as tp
    >>> typing.get_args(tp.Positions)
    ('keep', 'renumber')
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, Literal, get_args

from tokenprune.core.reads import Read
from tokenprune.core.reads.own import provides
from tokenprune.errors import BudgetError, PluginError
from tokenprune.plugins.attribution import blame_strategy

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy

Positions = Literal["keep", "renumber"]
RENUMBERS = "renumbers positions, from which a model tells places in the image; compare with positions=keep"


@dataclass(frozen=True)
class Shape:
    """What a strategy knows about a run before it starts.

    Attributes:
        layers: decoder layers, L.
        image_tokens: image tokens of one batch row, N.
        text_tokens: every other token of the row.
        tower_layers: layers of the vision tower, 0 if unknown.
        readable: kinds of reads that the model provides, None if unknown.
        heads: attention heads of the decoder, 0 if unknown.

    Examples:
        >>> import tokenprune as tp
        >>> shape = tp.Shape(layers=32, image_tokens=576, readable=frozenset({tp.HiddenStates}))
        >>> shape.offers(tp.HiddenStates), shape.offers(tp.TowerKeys)
        (True, False)
    """

    layers: int
    image_tokens: int
    text_tokens: int = 0
    tower_layers: int = 0
    readable: frozenset[type[Read]] | None = None
    heads: int = 0

    def offers(self, *kinds: type[Read]) -> bool:
        """Whether the model provides all of these reads, for stages that have alternatives; True if unknown."""
        readable = self.readable
        return readable is None or all(provides(readable, kind) for kind in kinds)

    def offered(self, *reads: Read) -> tuple[Read, ...]:
        """These reads if the model provides all of them, else none: for stages that do not depend on them."""
        return reads if self.offers(*(type(read) for read in reads)) else ()


@dataclass(frozen=True)
class Stage:
    """A run of layers with one set of active tokens, from `layer` up to the next stage.

    A strategy that needs more numbers than `tokens` (so many kept, so many merged) declares them in a subclass: with a
    budget they differ between rows, and `tokens.stages` holds the stage of each row.

    Attributes:
        name: the stage's name in traces and errors.
        layer: first decoder layer that runs with the tokens chosen here (0-based).
        tokens: image tokens active from here on, per row; None if it depends on the image.
        reads: what `choose` reads.
        positions: the position policy from this stage on: "renumber", or "keep" the current positions; None = the
            strategy's `positions`.
        prune_earlier_caches: whether, after the prefill, the KV caches of earlier layers lose the tokens that are not
            active from here on. They have computed them, but decoding needs no memory for them (IVC-Prune).
        caches_from: the first of these earlier layers.

    Raises:
        PluginError: a layer or a number of tokens that is not a whole number, a read that is not a
            `Read` object, an unknown position policy, or caches of no earlier layer.

    Examples:
        >>> import tokenprune as tp
        >>> stage = tp.Stage("prune", layer=2, tokens=144, reads=(tp.AttentionFrom("last"),))
        >>> stage.layer, stage.tokens
        (2, 144)
    """

    name: str
    layer: int
    tokens: int | None = None
    reads: tuple[Read, ...] = ()
    positions: Positions | None = field(default=None, kw_only=True)
    prune_earlier_caches: bool = field(default=False, kw_only=True, repr=False)
    caches_from: int = field(default=0, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PluginError(f"found {self.name!r} as the name of a stage; expected a text, such as 'prune'")
        reads = self.reads
        if not isinstance(reads, tuple):
            reads = tuple(reads) if isinstance(reads, Iterable) and not isinstance(reads, type | str) else (reads,)
        for read in reads:
            if not isinstance(read, Read):
                found = read.__name__ if isinstance(read, type) else repr(read)
                call = f"{found}()" if isinstance(read, type) and issubclass(read, Read) else "HiddenStates()"
                raise PluginError(f"stage {self.name!r}: {found} among its reads; expected objects such as {call}")
        object.__setattr__(self, "reads", reads)
        for name in ("layer", "tokens", "caches_from"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._whole(name, number))
        check_positions(f"stage {self.name!r}", self.positions)
        if not isinstance(self.prune_earlier_caches, bool) or self.caches_from is None:
            raise PluginError(
                f"stage {self.name!r}: prune_earlier_caches={self.prune_earlier_caches!r}, caches_from="
                f"{self.caches_from!r}; expected True or False, and the number of a layer"
            )
        if self.prune_earlier_caches and not 0 <= self.caches_from < self.layer:
            raise PluginError(
                f"stage {self.name!r}: prune_earlier_caches=True from layer {self.caches_from} on, but the stage is at "
                f"layer {self.layer}; expected caches_from in 0 … {self.layer - 1}, and a stage at layer 1 or later"
            )
        if self.caches_from and not self.prune_earlier_caches:
            raise PluginError(
                f"stage {self.name!r}: caches_from={self.caches_from} has no effect without prune_earlier_caches=True"
            )

    def _whole(self, name: str, number: Any) -> int:
        try:
            return index(number)
        except TypeError:
            raise PluginError(
                f"stage {self.name!r}: {name}={number!r} is {type(number).__name__}; expected int (use int(), round() "
                "or //)"
            ) from None


def declared_stages(strategy: Strategy, shape: Shape) -> list[Stage]:
    """The stages that `strategy.stages` gives.

    Raises:
        PluginError: `stages` raised an unexpected exception, or gave something other than stages.
        TokenPruneError: as the strategy raised it.
    """
    name = strategy.name
    try:  # not `blamed_strategy`, which is slow: solving a budget calls this often
        found = strategy.stages(shape)
        stages: list[Any] = list(found) if isinstance(found, Iterable) else [found]
    except (Exception, SystemExit) as error:
        blame_strategy(name, ": stages()", error)
    wrong = [stage for stage in stages if not isinstance(stage, Stage)]
    if wrong or not isinstance(found, Iterable):
        what = "one Stage" if isinstance(found, Stage) else repr(wrong[0])
        raise PluginError(f"strategy {name!r}: stages() gave {what}; expected to yield each Stage, or a list of them")
    return stages


def equivalent_tokens(stages: Sequence[Stage], shape: Shape) -> float:
    """Mean over decoder layers of the image tokens entering the layer, from declared stages.

    Raises:
        BudgetError: a stage whose number of tokens depends on the image.
    """
    total, active, start = 0.0, shape.image_tokens, 0
    for stage in stages:
        if stage.tokens is None:
            found = f"stage {stage.name!r} keeps a number of tokens that depends on the image"
            raise BudgetError(f"{found}; use fixed numbers for budgets")
        total += active * (min(stage.layer, shape.layers) - start)
        active, start = stage.tokens, min(stage.layer, shape.layers)
    return (total + active * (shape.layers - start)) / shape.layers


def check_tokens(strategy: Strategy, stages: Sequence[Stage], shape: Shape) -> None:
    """Raises PluginError for a stage that declares a negative number of tokens, or more than there are."""
    for stage in stages:
        if stage.tokens is not None and not 0 <= stage.tokens <= shape.image_tokens:
            raise PluginError(
                f"strategy {strategy.name!r}, stage {stage.name!r}: declares {stage.tokens} tokens of "
                f"{shape.image_tokens}; expected 0 … {shape.image_tokens}"
            )


def check_positions(who: str, positions: object) -> None:
    """Raises PluginError, naming `who`, for an unknown position policy; None is allowed."""
    if positions is not None and positions not in get_args(Positions):
        raise PluginError(f"{who}: positions={positions!r}; expected 'keep' or 'renumber'")
