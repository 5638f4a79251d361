"""The strategy base class: options, the stages it declares, the one method that chooses, and the budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune.core.stage import Positions, Shape, Stage, check_positions, equivalent_tokens
from tokenprune.errors import BudgetError, OptionError, PluginError
from tokenprune.plugins.attribution import blame_strategy, blamed_strategy

if TYPE_CHECKING:
    from tokenprune.core.decisions import Decision
    from tokenprune.core.tokens import Tokens


class StrategyOptions(BaseModel):
    """Base of every strategy's options: unknown names are refused, values are checked, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
        check_positions(f"strategy {self.name!r}", self.positions)

    def _checked(self, options: dict[str, Any]) -> StrategyOptions:
        try:
            return self.Options(**options)
        except ValidationError as error:
            raise OptionError.from_validation(f"strategy {self.name!r}", error, self.Options.model_fields) from error


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
