"""Compositions: strategies that prune one after the other, each from the tokens that the previous one kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tokenprune.core.budget import in_vain, too_small
from tokenprune.core.by_name import made, parts_of
from tokenprune.core.composition.remaining_tokens import PartTokens, RemainingTokens
from tokenprune.core.decisions import Decision
from tokenprune.core.scheduling.validation import check_decision
from tokenprune.core.stage import Shape, Stage, declared_stages, equivalent_tokens
from tokenprune.core.strategy import Strategy, StrategyOptions
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, OptionError, TokenPruneError
from tokenprune.utils.arguments import instance

_Share = Annotated[float, Field(gt=0, le=1)]


def _slashed(budgets: Any) -> Any:
    """ "0.5/0.25" -> [0.5, 0.25], for command lines, where commas separate strategies; "-" is no budget."""
    return [None if part == "-" else part for part in budgets.split("/")] if isinstance(budgets, str) else budgets


class Sequence(Strategy):
    """Strategies one after the other: `Sequence(a, b)`.

    Every part sees the image tokens that the previous part kept, renumbered, as if there were no others: its shares and
    its budget refer to these tokens. Layers, and the equivalent tokens of the composition, are those of the model. Each
    part's position policy applies from its first stage on.

    A `budget` for the composition is given to the parts that have no budget of their own and would be changed by one:
    all get the same share, the largest that meets it.

    Attributes:
        name: the parts' names joined by "+".
        parts: the strategies.
        positions: "renumber" where any part renumbers.

    Examples:
        >>> import tokenprune as tp
        >>> both = tp.Sequence("uniform", tp.strategy("fastv", layer=3), budget=0.25)
        >>> both
        Sequence(Uniform(), FastV(layer=3), budget=0.25)
        >>> both.name
        'uniform+fastv'
    """

    name = "sequence"
    budget_option = "budgets"

    class Options(StrategyOptions):
        """Options of a composition."""

        budgets: Annotated[tuple[_Share | None, ...] | None, BeforeValidator(_slashed)] = Field(
            None, description="a budget for each part, of the tokens that the previous part keeps; None = no budget"
        )
        parts: tuple[dict[str, Any], ...] | None = Field(None, description="options for each part")

    options: Options

    def __init__(self, *parts: Strategy | str, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError for fewer than two parts or unsuitable options, and the errors of `strategy` for names."""
        found = [part for given in parts for part in _flat(given)]
        self.name = "+".join(part.name for part in found)
        if len(found) < 2:
            raise OptionError(f"Sequence({self.name}): {len(found)} strategies found, expected at least two")
        super().__init__(budget=budget, **options)
        for name in ("budgets", "parts"):
            given = getattr(self.options, name)
            if given is not None and len(given) != len(found):
                raise OptionError(
                    f"strategy {self.name!r}: option {name!r}: found {len(given)} for {len(found)} parts; give one "
                    "for each"
                )
        if budget is not None and not any(part.takes_budget() for part in found):
            raise in_vain(self)
        changes = self.options.parts or ({},) * len(found)
        budgets = self.options.budgets or (None,) * len(found)
        found = [
            _budgeted(part.with_options(**change), part.budget) if change else part
            for part, change in zip(found, changes, strict=True)
        ]
        for part, own in zip(found, budgets, strict=True):
            if own is not None and not part.takes_budget():
                raise BudgetError(
                    f"strategy {self.name!r}: option 'budgets': {part.name!r} has nothing that a budget could move; "
                    "leave its own out, as in -/0.5"
                )
        self.parts = tuple(_budgeted(part, own) if own else part for part, own in zip(found, budgets, strict=True))
        self.positions = "renumber" if any(part.positions == "renumber" for part in self.parts) else "keep"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """The parts' stages, named "1:fastv/prune".

        Raises:
            OptionError: a part begins before the previous one has ended, reads a layer that ran before that, or needs a
                number of tokens that depends on the image.
            BudgetError: a part's budget cannot be met with the remaining tokens.
        """
        ready = self if self.budget is None else self.bind(shape)
        return [stage for _, stages in ready.chain(shape) for stage in stages]

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """The decision of the part that the stage belongs to."""
        key = stage.name.partition("/")[0]
        part = self.parts[int(key.partition(":")[0]) - 1]
        own, *others = (replace(s, name=s.name.partition("/")[2]) for s in (stage, *tokens.stages))
        if key not in tokens.memory:
            tokens.memory[key] = RemainingTokens.of(tokens), {}
        left: RemainingTokens
        left, memory = tokens.memory[key]
        view = PartTokens(tokens, left, own, others, memory)
        answer = part.choose(own, view)
        view.check_unwritten(f"{self.name}: {part.name}")
        decision = check_decision(answer, view.left_state, who=f"{self.name}: {part.name}", stage=own.name)
        return left.whole(decision, tokens.exists.shape[1])

    def bind(self, shape: Shape) -> Sequence:
        """A copy with the budgets of every part and of the composition resolved into options."""
        if shape.image_tokens == 0:
            return self
        ready = self
        if self.budget is not None:
            ready = self._budgeted(self.solve_budget(self.budget, shape)["budgets"])
        return ready._of([part for part, _ in ready.chain(shape)])

    def chain(self, shape: Shape) -> list[tuple[Strategy, list[Stage]]]:
        """Every part, bound to the tokens that the previous parts keep, and its stages; errors as for `stages`."""
        found: list[tuple[Strategy, list[Stage]]] = []
        left: int | None = shape.image_tokens
        last = -1
        for number, part in enumerate(self.parts, 1):
            here = replace(shape, image_tokens=shape.image_tokens if left is None else left)
            try:
                bound = part.bind(here)
                stages = declared_stages(bound, here)
            except OptionError as error:
                raise type(error)(f"strategy {self.name!r}, part {number}: {error}") from error
            if number > 1 and stages and shape.image_tokens:
                self._check(number, bound, stages, left, last)
            name, policy = f"{number}:{part.name}", bound.positions
            named = [replace(s, name=f"{name}/{s.name}", positions=s.positions or policy) for s in stages]
            found.append((bound, named))
            if stages:
                left, last = stages[-1].tokens, stages[-1].layer
        return found

    def solve_budget(self, budget: float, shape: Shape) -> dict[str, Any]:
        """`budgets` for the composition: the largest share that every part without a budget can have.

        Raises:
            BudgetError: there is no such share, or no part that a budget would change.
        """
        free = [part.budget is None and _moves(part, shape) for part in self.parts]
        room, least, best = budget * shape.image_tokens + 1e-9, float("inf"), None
        steps = 4 * shape.image_tokens
        low, high = (0, steps) if any(free) else (steps - 1, steps)
        problem: BudgetError | None = None
        while low < high:
            step = (low + high + 1) // 2
            budgets = tuple(step / steps if is_free else None for is_free in free)
            try:
                stages = [stage for _, stages in self._budgeted(budgets).chain(shape) for stage in stages]
                spent = equivalent_tokens(stages, shape)
            except BudgetError as error:  # too few tokens for a part
                low, problem = step, error
                continue
            least = min(least, spent)
            if spent <= room:
                low, best = step, budgets
            else:
                high = step - 1
        if best is not None:
            return {"budgets": best}
        if problem is not None and least == float("inf"):
            raise problem
        raise too_small(self, budget, shape, least)

    def with_options(self, **changes: Any) -> Sequence:
        """A copy without a budget for the composition; `changes` are `budgets` and `parts`."""
        return Sequence(*self.parts, **changes)

    def reseeded(self, offset: int) -> Sequence:
        """A copy whose parts draw new random numbers."""
        copied = self._of([part.reseeded(offset) for part in self.parts])
        copied.budget = self.budget
        return copied

    def __repr__(self) -> str:
        parts = ", ".join(map(repr, self.parts))
        return f"Sequence({parts})" if self.budget is None else f"Sequence({parts}, budget={self.budget!r})"

    def _check(self, number: int, part: Strategy, stages: list[Stage], left: int | None, last: int) -> None:
        before = f"strategy {self.name!r}: part {number - 1}, {self.parts[number - 2].name!r},"
        first = stages[0]
        if first.layer < last:
            raise OptionError(
                f"{before} has its last stage at layer {last}, and part {number}, {part.name!r}, its first at layer "
                f"{first.layer}; change their layers or their order"
            )
        if first.layer == last and any(
            read.looks_back for stage in stages for read in stage.reads if stage.layer == last
        ):
            raise OptionError(
                f"{before} chooses on entering layer {last}, where part {number}, {part.name!r}, reads the layer "
                f"before, which ran on other tokens; begin part {number} at layer {last + 1} or later"
            )
        if left is None and any(stage.tokens for stage in stages):
            raise OptionError(
                f"{before} leaves a number of tokens that depends on the image, and part {number}, {part.name!r}, must "
                f"know it before the run; give part {number - 1} a budget or a fixed number"
            )
        if left == 0:
            raise OptionError(
                f"{before} leaves no image token to part {number}, {part.name!r}; leave part {number} out"
            )

    def _budgeted(self, budgets: ListOf[float | None]) -> Sequence:
        """A copy whose parts have these budgets; None leaves a part as it is."""
        return self._of([_budgeted(p, b) if b is not None else p for p, b in zip(self.parts, budgets, strict=True)])

    def _of(self, parts: ListOf[Strategy]) -> Sequence:
        copied = copy.copy(self)
        copied.parts, copied.budget = tuple(parts), None
        return copied


def _flat(part: Strategy | str) -> tuple[Strategy, ...]:
    if isinstance(part, str):
        return tuple(made(entry) for entry in parts_of(part))
    instance("part of a Sequence", part, Strategy, "a strategy, or the name of one")
    if not isinstance(part, Sequence):
        return (part,)
    if part.budget is not None:
        raise OptionError(
            f"strategy {part.name!r} has a budget of its own inside a Sequence; give budgets to its parts"
        )
    return part.parts


def _budgeted(part: Strategy, budget: float | None) -> Strategy:
    copied = copy.copy(part)
    copied.budget = budget
    return copied


def _moves(part: Strategy, shape: Shape) -> bool:
    """Whether a budget would change what a part declares."""
    if not part.Options.model_fields:
        return False
    try:
        whole = list(_budgeted(part, 1.0).bind(shape).stages(shape))
        return whole != list(part.stages(shape))
    except TokenPruneError:
        return False
