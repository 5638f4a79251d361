"""The budget solver: from a share of the image tokens to options, in one way for all strategies.

A strategy declares *ladders* of what a budget moves: lists of option settings, each from most tokens to fewest. The
solver takes the first setting that fits from the first ladder that has one. Most strategies have one ladder of token
counts (`Strategy.budget_option`), or one for each layer at which they may begin (`Strategy.budget_layer`).

The cost of a setting is computed from the stages that the strategy declares with it, with the ledger's arithmetic.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache, partial
from math import inf
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from tokenprune.core.stage import Shape, check_tokens, declared_stages, equivalent_tokens
from tokenprune.errors import BudgetError, OptionError, PluginError
from tokenprune.utils.arguments import shown

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy

Ladder: TypeAlias = Sequence[dict[str, Any]]
"""Option settings, from most tokens to fewest."""


def solve(strategy: Strategy, budget: float, shape: Shape) -> dict[str, Any]:
    """The options with which a strategy comes closest to a budget without exceeding it.

    If the option that a budget moves holds one number per stage, the remainder goes to the last stage, then to the one
    before it, and so on.

    Raises:
        BudgetError: no setting fits; the message gives the smallest possible budget.
        OptionError: the options that the user set are not possible for this shape.
        PluginError: see `ladders`; or the stages of every setting declare more tokens than there are.
    """
    room = budget * shape.image_tokens + 1e-6 / shape.layers  # tokens are whole numbers: allow for rounding
    least, setting = inf, dict[str, Any]()
    for ladder in filter(len, strategy.budget_ladders(shape)):
        spent = _Spent(strategy, ladder, shape)
        found = bisect_left(spent, True, key=lambda tokens: tokens <= room)
        if found == len(ladder) and spent[-1] == inf:  # the lowest settings are not allowed: try higher ones
            found = next((rung for rung, tokens in enumerate(spent) if tokens <= room), found)
        if found < len(ladder):
            by_user = len(ladder) == 1
            return ladder[found] if by_user else _topped_up(strategy, ladder[found], shape, room)
        least, setting = min(least, *spent), ladder[0]
    if least == inf:  # the options that the user set are not possible, or stages declare no number of tokens
        check_counted(strategy.with_options(**setting), budget, shape)
    elif least > shape.image_tokens:
        check_tokens(strategy, declared_stages(strategy.with_options(**setting), shape), shape)
    raise too_small(strategy, budget, shape, least)


class _Spent(Sequence[float]):
    """Equivalent tokens of each setting of a ladder, computed on access."""

    def __init__(self, strategy: Strategy, ladder: Ladder, shape: Shape) -> None:
        self._of = cache(lambda rung: equivalent_tokens_with(strategy, ladder[rung], shape))
        self._length = len(ladder)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, rung: Any) -> Any:
        if not -self._length <= rung < self._length:
            raise IndexError(rung)
        return self._of(rung % self._length)


def ladders(strategy: Strategy, shape: Shape) -> Iterator[Ladder]:
    """The ladders of a strategy that declares which options a budget moves; options that the user set are not moved.

    `budget_option` takes token counts if its type allows them, else shares in steps of 1/N. The layer of `budget_layer`
    starts at the option's value and moves down one layer at a time.

    Raises:
        PluginError: `budget_option` is not the name of an option that takes shares.
    """
    option, total = strategy.budget_option, shape.image_tokens
    if option is None:  # nothing moves: the budget is met as it is, or not at all
        yield [{}]
        return
    whole = _takes_whole_numbers(strategy, option)
    amounts: Sequence[Any] = range(total, 0, -1) if whole else [tokens / total for tokens in range(total, -1, -1)]
    if _set_by_user(strategy, option):
        amounts = [getattr(strategy.options, option)]
    for layer in _layers(strategy, shape):
        yield [{**layer, option: amount} for amount in amounts]


def equivalent_tokens_with(strategy: Strategy, changes: dict[str, Any], shape: Shape) -> float:
    """Equivalent tokens with these options; infinite where the options themselves are not allowed."""
    try:
        return equivalent_tokens(declared_stages(strategy.with_options(**changes), shape), shape)
    except OptionError:
        return inf


def check_counted(strategy: Strategy, budget: float, shape: Shape) -> None:
    """Raise BudgetError if a stage keeps a number of tokens that depends on the image, so that no budget can be met."""
    try:
        equivalent_tokens(declared_stages(strategy, shape), shape)
    except BudgetError as error:
        raise BudgetError(f"strategy {strategy.name!r} cannot meet budget {budget:g}: {error}") from error


def too_small(strategy: Strategy, budget: float, shape: Shape, least: float) -> BudgetError:
    """The error for a budget that cannot be met.

    Args:
        strategy: that cannot meet the budget.
        budget: as requested.
        shape: of the run.
        least: the fewest equivalent tokens that it needs.
    """
    options = strategy.options.model_dump(exclude_unset=True) or "at their defaults"
    return BudgetError(
        f"strategy {strategy.name!r} cannot meet budget {budget:g} on {shape.layers} layers and {shape.image_tokens} "
        f"image tokens with options {options}: the smallest possible budget is {least / shape.image_tokens:.3f}; raise "
        "the budget or change the options"
    )


def checked_budget(name: str, budget: object) -> float:
    """The value as a share of the image tokens in (0, 1]; else raises BudgetError, with `name` in the message."""
    share = float(budget) if isinstance(budget, Real) and not isinstance(budget, bool) else 0.0
    if not 0 < share <= 1:
        cure = f"; for {share:g} % write {share / 100:g}" if 2 <= share <= 100 else ""
        raise BudgetError(f"{name} must be a share of the image tokens in (0, 1], got {shown(budget)}{cure}")
    return share


def budget_words(strategy: Strategy) -> str:
    """The budget as it follows a strategy's name: " at 0.5", or nothing.

    " at most 0.5" if the user set the option that a budget moves: then the budget is only an upper limit.
    """
    if strategy.budget is None:
        return ""
    fixed = _set_by_user(strategy, strategy.budget_option or "")
    return f" {'at most' if fixed else 'at'} {strategy.budget:g}"


def in_vain(strategy: Strategy) -> BudgetError:
    """The error for a budget that would not change the strategy."""
    return BudgetError(f"strategy {strategy.name!r} has nothing that a budget could move; leave budget= out")


def _set_by_user(strategy: Strategy, option: str) -> bool:
    """True if the user gave the option a value; None, with which a budget may move it, is none."""
    return option in strategy.options.model_fields_set and getattr(strategy.options, option) is not None


def _layers(strategy: Strategy, shape: Shape) -> list[dict[str, Any]]:
    """Settings of the first layer, the preferred one first."""
    if strategy.budget_layer is None:
        return [{}]
    option, least = strategy.budget_layer
    preferred = getattr(strategy.options, option)
    if option in strategy.options.model_fields_set:
        return [{option: preferred}]
    single = not isinstance(preferred, tuple)
    first = max(least, min(preferred if single else preferred[0], shape.layers - 1))
    return [{option: layer if single else (layer,)} for layer in range(first, least - 1, -1)]


def _takes_whole_numbers(strategy: Strategy, option: object) -> bool:
    known = strategy.Options.model_fields
    chosen = known.get(option) if isinstance(option, str) else None
    if chosen is None or chosen.annotation in (int, str, bool):
        kind = getattr(chosen and chosen.annotation, "__name__", "")
        found = f"is of type {kind}" if kind else f"is none of its options ({', '.join(known) or 'none'})"
        raise PluginError(
            f"strategy {strategy.name!r}: budget_option {option!r} {found}; expected a float option, a share of the "
            "image tokens, which a budget moves (or override budget_ladders)"
        )
    return int in _parts(chosen.annotation)


def _parts(annotation: Any) -> set[Any]:
    """The types of a union, unions and annotations inside it included."""
    inner = get_args(annotation)
    return {annotation} if not inner else {part for one in inner for part in _parts(one)}


def _topped_up(strategy: Strategy, setting: dict[str, Any], shape: Shape, room: float) -> dict[str, Any]:
    """The setting after the remaining budget was given to its stages, the last ones first."""
    option = strategy.budget_option or ""
    counts: Any = setting.get(option)
    if not isinstance(counts, tuple):
        return setting

    def passes(stage: int, count: int) -> bool:
        changed = {**setting, option: (*counts[:stage], count, *counts[stage + 1 :])}
        return equivalent_tokens_with(strategy, changed, shape) > room

    for stage in [*reversed(range(len(counts)))] * len(counts):
        more = range(counts[stage] + 1, (counts[stage - 1] if stage else shape.image_tokens) + 1)
        fitting = bisect_left(more, True, key=partial(passes, stage))
        counts = (*counts[:stage], counts[stage] + fitting, *counts[stage + 1 :])
    return {**setting, option: counts}
