"""The strategy base class: options, the stages it declares, the one method that chooses, and the budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune.errors import BudgetError, OptionError, PluginError
from tokenprune.plugins.attribution import blame_strategy, blamed_strategy
from tokenprune.reads import Read

if TYPE_CHECKING:
    from tokenprune.decisions import Decision
    from tokenprune.tokens import Tokens

Positions = Literal["keep", "renumber"]


class StrategyOptions(BaseModel):
    """Base of every strategy's options: unknown names are refused, values are checked, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Shape:
    """What a strategy may know of a run before it starts.

    Attributes:
        layers: decoder layers, L.
        image_tokens: image tokens of one batch row, N.
        text_tokens: every other token of the row.
        tower_layers: layers of the vision tower, 0 where unknown.
        readable: kinds of reads that the model offers, None where unknown.
        heads: attention heads of the decoder, 0 where unknown.
    """

    layers: int
    image_tokens: int
    text_tokens: int = 0
    tower_layers: int = 0
    readable: frozenset[type[Read]] | None = None
    heads: int = 0

    def offers(self, *kinds: type[Read]) -> bool:
        """Whether the model offers all of these reads, so that stages can choose what they read; True where unknown."""
        return self.readable is None or self.readable.issuperset(kinds)


@dataclass(frozen=True)
class Stage:
    """A run of layers with one active set, from `layer` up to the next stage.

    A strategy whose choice takes more numbers than `tokens` (so many kept, so many merged) declares them in a subclass:
    with a budget they differ from row to row, and `tokens.stages` has each row's own.

    Attributes:
        name: the stage's name in traces and errors.
        layer: first decoder layer that runs with what is chosen here (0-based).
        tokens: image tokens active from here on, per row; None where only the content can tell.
        reads: what `choose` looks at.
        positions: from this stage on, positions are counted anew ("renumber"), or tokens keep those that they have by
            now ("keep"); None = as the strategy's `positions` says.

    Raises:
        PluginError: a layer or a number of tokens that is not a whole number, something among the reads that is no
            `Read`, or an unknown position policy.
    """

    name: str
    layer: int
    tokens: int | None = None
    reads: tuple[Read, ...] = ()
    positions: Positions | None = field(default=None, kw_only=True)

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
        for name in ("layer", "tokens"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._whole(name, number))
        _check_positions(f"stage {self.name!r}", self.positions)

    def _whole(self, name: str, number: Any) -> int:
        try:
            return index(number)
        except TypeError:
            raise PluginError(
                f"stage {self.name!r}: {name}={number!r} is {type(number).__name__}; expected int (use int(), round() "
                "or //)"
            ) from None


class Strategy(ABC):
    """A visual-token pruning method.

    Subclasses give `name`, nested `Options`, `stages` and `choose`. Instances hold options only, never the state of a
    run, so that one instance serves several models and threads.

    Attributes:
        name: registered name.
        budget_option: the option that the budget solver moves; a subclass with several moves them in `fit`.
        positions: "keep" (RoPE at original positions) or "renumber" (as if the input were shorter), unless a stage says
            otherwise; "renumber" where any stage renumbers.
    """

    name: str
    budget_option: ClassVar[str | None] = None
    positions: Positions = "keep"

    class Options(StrategyOptions):
        """No options."""

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError for an unknown option or bad value, BudgetError for a budget outside (0, 1] or in vain."""
        if budget is not None and not 0 < budget <= 1:
            raise BudgetError(
                f"strategy {self.name!r}: budget {budget} found, expected a share of the image tokens in (0, 1]"
            )
        self._check_class()
        if budget is not None and not self.takes_budget():
            raise self._budget_in_vain()
        self.budget = budget
        self.options = self._checked(options)

    # what an author writes -------------------------------------------------------------------------------------------

    @abstractmethod
    def stages(self, shape: Shape) -> Iterable[Stage]:
        """The stages for one batch row, in ascending order of layers. Layers before the first run in full."""

    @abstractmethod
    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Choose for the whole batch on entering `stage`."""

    def fit(self, budget: float, shape: Shape) -> dict[str, Any]:
        """Options that meet the budget on this shape: the largest `budget_option` share in 1/N steps that fits.

        Options that the user set explicitly are kept. Override where several options move together.

        Raises:
            BudgetError: no value fits.
            PluginError: `budget_option` is not the name of an option that takes shares.
        """
        option = self.budget_option
        if option is None:
            raise self._budget_in_vain()
        known = self.Options.model_fields
        chosen = known.get(option) if isinstance(option, str) else None
        if chosen is None or chosen.annotation in (int, str, bool):
            kind = getattr(chosen and chosen.annotation, "__name__", "")
            found = f"is of type {kind}" if kind else f"is none of its options ({', '.join(known) or 'none'})"
            raise PluginError(
                f"strategy {self.name!r}: budget_option {option!r} {found}; expected a float option, a share of the "
                "image tokens, which a budget moves (or override fit)"
            )
        least, shares = float("inf"), [tokens / shape.image_tokens for tokens in range(shape.image_tokens, -1, -1)]
        for share in [getattr(self.options, option)] if option in self.options.model_fields_set else shares:
            candidate = {option: share}
            spent = self.spends(candidate, shape)
            if spent <= budget * shape.image_tokens + 1e-9:
                return candidate
            least = min(least, spent)
        raise self.too_small(budget, shape, least)

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether a budget can move anything: there are options, and it is said how a budget moves them."""
        return (cls.budget_option is not None or cls.fit is not Strategy.fit) and bool(cls.Options.model_fields)

    def without_effect(self) -> Mapping[str, str]:
        """Options that change nothing beside the others and the budget, each with the reason ("unless layer=0").

        `tokenprune.strategy` refuses those among them that the user sets.
        """
        return {}

    # what the framework calls ----------------------------------------------------------------------------------------

    def bind(self, shape: Shape) -> Strategy:
        """The same strategy with its budget, if any, turned into options for this shape.

        Raises:
            BudgetError: the budget cannot be met.
            PluginError: `fit` raised what is no TokenPruneError, or gave no options.
        """
        if self.budget is None or shape.image_tokens == 0:
            return self
        with blamed_strategy(self.name, ": fit()"):
            moved = self.fit(self.budget, shape)
        if not isinstance(moved, Mapping) or not all(isinstance(option, str) for option in moved):
            raise PluginError(
                f"strategy {self.name!r}: fit() gave {moved!r}; expected values by the names of options, such as "
                "{'keep': 0.5}"
            )
        return self.with_options(**moved)

    def with_options(self, **changes: Any) -> Strategy:
        """A copy without a budget whose options differ by `changes`."""
        chosen = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        return type(self)(**{**chosen, **changes})

    def reseeded(self, offset: int) -> Strategy:
        """A copy whose option `seed` is moved by `offset`, so that every sample of a data set draws anew.

        The strategy itself where it has no such option.
        """
        if offset == 0 or "seed" not in self.Options.model_fields:
            return self
        chosen = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        seed: int = getattr(self.options, "seed") + offset  # noqa: B009 - only some options have it
        return type(self)(budget=self.budget, **{**chosen, "seed": seed})

    def spends(self, changes: dict[str, Any], shape: Shape) -> float:
        """Equivalent tokens with these options; infinite where the options themselves are not allowed."""
        try:
            candidate = self.with_options(**changes)
        except OptionError:
            return float("inf")
        return equivalent_tokens(declared_stages(candidate, shape), shape)

    def too_small(self, budget: float, shape: Shape, least: float) -> BudgetError:
        """The error for a budget that cannot be met, naming the least that can."""
        share = least / shape.image_tokens
        return BudgetError(
            f"strategy {self.name!r} cannot meet budget {budget:g} on {shape.layers} layers and "
            f"{shape.image_tokens} image "
            f"tokens with options {self.options.model_dump(exclude_unset=True) or 'at their defaults'}: its least is "
            f"{share:.3f}; raise the budget or change the options"
        )

    def _budget_in_vain(self) -> BudgetError:
        return BudgetError(f"strategy {self.name!r} has nothing that a budget could move; leave budget= out")

    def __repr__(self) -> str:
        given = self.options.model_dump(exclude_unset=True)
        budget = {} if self.budget is None else {"budget": self.budget}
        inner = ", ".join(f"{k}={v!r}" for k, v in {**budget, **given}.items())
        return f"{type(self).__name__}({inner})"

    def _check_class(self) -> None:
        here = type(self).__qualname__
        if not isinstance(getattr(self, "name", None), str):
            raise PluginError(f"strategy class {here} has no name; expected one, as in name = {here.lower()!r}")
        if not (isinstance(self.Options, type) and issubclass(self.Options, StrategyOptions)):
            raise PluginError(
                f"strategy {self.name!r}: Options is {self.Options!r}; expected a class that inherits "
                "tokenprune.StrategyOptions"
            )
        _check_positions(f"strategy {self.name!r}", self.positions)

    def _checked(self, options: dict[str, Any]) -> StrategyOptions:
        try:
            return self.Options(**options)
        except ValidationError as error:
            raise OptionError.from_validation(f"strategy {self.name!r}", error, self.Options.model_fields) from error


def portion(share: float, total: int) -> int:
    """floor(share · total), forgiving the last bits of a product that should be whole."""
    return int(share * total + 1e-6)


def declared_stages(strategy: Strategy, shape: Shape) -> list[Stage]:
    """What `strategy.stages` gives.

    Raises:
        PluginError: `stages` raised what is no TokenPruneError, or gave something else than stages.
        TokenPruneError: as the strategy raised it.
    """
    name = strategy.name
    try:  # not `blamed_strategy`: a budget is solved by asking for the stages of many options
        found = strategy.stages(shape)
        stages: list[Any] = list(found) if isinstance(found, Iterable) else [found]
    except (Exception, SystemExit) as error:
        blame_strategy(name, ": stages()", error)
    wrong = [stage for stage in stages if not isinstance(stage, Stage)]
    if wrong or not isinstance(found, Iterable):
        what = "one Stage" if isinstance(found, Stage) else repr(wrong[0])
        raise PluginError(f"strategy {name!r}: stages() gave {what}; expected to yield each Stage, or a list of them")
    return stages


def _check_positions(who: str, positions: object) -> None:
    if positions is not None and positions not in get_args(Positions):
        raise PluginError(f"{who}: positions={positions!r}; expected 'keep' or 'renumber'")


def equivalent_tokens(stages: Sequence[Stage], shape: Shape) -> float:
    """Mean over decoder layers of the image tokens entering the layer, from declared stages.

    Raises:
        BudgetError: a stage whose number of tokens only the content can tell.
    """
    total, active, start = 0.0, shape.image_tokens, 0
    for stage in stages:
        if stage.tokens is None:
            found = f"stage {stage.name!r} keeps a number of tokens that depends on the image"
            raise BudgetError(f"{found}; use fixed numbers for budgets")
        total += active * (min(stage.layer, shape.layers) - start)
        active, start = stage.tokens, min(stage.layer, shape.layers)
    return (total + active * (shape.layers - start)) / shape.layers
