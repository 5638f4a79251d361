"""The base class of strategies: options, declared stages, the choice at a stage, and the budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune.core.budget import Ladder, checked_budget, in_vain, ladders, solve
from tokenprune.core.stage import Positions, Shape, Stage, check_positions
from tokenprune.errors import OptionError, PluginError
from tokenprune.plugins.attribution import blamed_strategy
from tokenprune.utils.arguments import instance

if TYPE_CHECKING:
    from tokenprune.core.decisions import Decision
    from tokenprune.core.tokens import Tokens


class StrategyOptions(BaseModel):
    """Base of every strategy's options: unknown names are refused, values are checked, instances do not change.

    Examples:
        >>> import tokenprune as tp
        >>> class Options(tp.StrategyOptions):
        ...     layer: int = 2
        >>> Options(layer=3)
        Options(layer=3)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strategy(ABC):
    """A visual-token pruning method.

    Subclasses define `name`, a nested class `Options`, `stages` and `choose`. Instances hold options only, not the
    state of a run: one instance can be used with several models and threads.

    Attributes:
        name: registered name.
        budget_option: the option that a budget moves: a share, or a number of tokens if its type allows one.
        budget_layer: the name of a layer option that a budget moves down if `budget_option` alone is not enough, and
            the lowest layer allowed.
        positions: "keep" (RoPE at original positions) or "renumber" (as if the input were shorter), for stages without
            a policy of their own; "renumber" if any stage renumbers. An option of that name sets it.

    Examples:
        >>> import torch, tokenprune as tp
        >>> class EverySecond(tp.Strategy):
        ...     name = "every-second"
        ...
        ...     def stages(self, shape):
        ...         yield tp.Stage("prune", layer=1, tokens=(shape.image_tokens + 1) // 2)
        ...
        ...     def choose(self, stage, tokens):
        ...         even = torch.arange(tokens.active.shape[1]) % 2 == 0
        ...         return tp.Keep.where(tokens.active & even)
        >>> list(EverySecond().stages(tp.Shape(layers=4, image_tokens=16)))
        [Stage(name='prune', layer=1, tokens=8, reads=(), positions=None)]
    """

    name: str
    budget_option: ClassVar[str | None] = None
    budget_layer: tuple[str, int] | None = None
    positions: Positions = "keep"

    class Options(StrategyOptions):
        """No options."""

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError for an unknown option or invalid value, BudgetError for an invalid or unused budget."""
        if budget is not None:
            budget = checked_budget(f"strategy {self.name!r}: budget", budget)
        self._check_class()
        if budget is not None and not self.takes_budget():
            raise in_vain(self)
        self.budget = budget
        self.options = self._checked(options)
        if "positions" in self.Options.model_fields:
            self.positions = getattr(self.options, "positions")  # noqa: B009 - only some options have it
            check_positions(f"strategy {self.name!r}: option 'positions'", self.positions)

    # for authors ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def stages(self, shape: Shape) -> Iterable[Stage]:
        """The stages for one batch row, in ascending order of layers. Layers before the first run in full."""

    @abstractmethod
    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Choose for the whole batch on entering `stage`."""

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """What a budget moves: lists of option settings, each from most tokens to fewest; see `core.budget`.

        By default those that `budget_option` and `budget_layer` name. Override if several options move together;
        options that the user set explicitly must not move.
        """
        return ladders(self, shape)

    def solve_budget(self, budget: float, shape: Shape) -> dict[str, Any]:
        """The options that meet a budget on this shape; override only if ladders cannot describe the method.

        Raises:
            BudgetError: no options meet it.
            PluginError: `budget_option` is not the name of an option that takes shares.
        """
        return solve(self, budget, shape)

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether a budget has an effect: there are options, and the class declares how a budget moves them."""
        own = cls.budget_ladders is not Strategy.budget_ladders or cls.solve_budget is not Strategy.solve_budget
        return (cls.budget_option is not None or own) and bool(cls.Options.model_fields)

    def without_effect(self) -> Mapping[str, str]:
        """Options without effect beside the others and the budget, each with the reason ("unless layer=0").

        `tokenprune.strategy` refuses such an option if the user sets it.
        """
        return {}

    # for the framework --------------------------------------------------------------------------------------------

    def bind(self, shape: Shape) -> Strategy:
        """The strategy with its budget, if any, resolved into options for this shape.

        Raises:
            BudgetError: the budget cannot be met.
            PluginError: the strategy raised an unexpected exception, or did not return options.
        """
        if self.budget is None or shape.image_tokens == 0:
            return self
        with blamed_strategy(self.name, ": solve_budget()"):
            moved = self.solve_budget(self.budget, shape)
        if not isinstance(moved, Mapping) or not all(isinstance(option, str) for option in moved):
            raise PluginError(
                f"strategy {self.name!r}: solve_budget() gave {moved!r}; expected values by the names of options, such "
                "as {'keep': 0.5}"
            )
        return self.with_options(**moved)

    def with_options(self, **changes: Any) -> Strategy:
        """A copy without a budget whose options differ by `changes`."""
        chosen = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        return type(self)(**{**chosen, **changes})

    def reseeded(self, offset: int) -> Strategy:
        """A copy whose option `seed` is increased by `offset`: another draw for every sample of a dataset.

        The strategy itself if it has no such option.
        """
        if offset == 0 or "seed" not in self.Options.model_fields:
            return self
        chosen = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        seed: int = getattr(self.options, "seed") + offset  # noqa: B009 - only some options have it
        return type(self)(budget=self.budget, **{**chosen, "seed": seed})

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


def checked_strategy(strategy: object) -> Strategy:
    """The argument `strategy`, if it is a `Strategy`. Raises OptionError otherwise, for example for a name."""
    found: Strategy = instance("strategy", strategy, Strategy, "an instance, such as tokenprune.strategy('fastv')")
    return found
