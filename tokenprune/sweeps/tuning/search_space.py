"""The search space of a strategy: values for each of its options, derived from their types and bounds."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tokenprune.core.composition.sequence import Sequence
from tokenprune.core.options import Amount, Depth
from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, OptionError, TokenPruneError
from tokenprune.plugins.attribution import blamed_strategy

STEPS = 20  # of a range of real numbers
WIDER = 4  # times the default, where a number has no upper bound
SAMPLES = 8  # values of an option that are tried to see whether others have an effect
GIVE = "give values with --search"


@dataclass(frozen=True)
class Choices:
    """One of these values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; real ones in steps."""

    low: int | float
    high: int | float

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> tuple[int | float, ...]:
        """All of them."""
        if self.whole:
            return tuple(range(int(self.low), int(self.high) + 1))
        step = (self.high - self.low) / STEPS
        return tuple(round(self.low + step * number, 6) for number in range(STEPS + 1))

    def __str__(self) -> str:
        return f"{self.low} … {self.high}"


Domain: TypeAlias = Choices | Range


@dataclass(frozen=True)
class Space:
    """What a search varies.

    Attributes:
        domains: the values of every option that is searched.
        left_out: why the other options are not.
    """

    domains: dict[str, Domain]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Combinations in all."""
        return prod(len(domain.values) for domain in self.domains.values())


def derived(plain: Strategy, budget: float, shape: Shape, given: Mapping[str, Domain] | None = None) -> Space:
    """The search space of a strategy at a budget.

    Options that hold a number of tokens and that the budget moves are not searched, so that every combination spends
    as much of the budget as it can. Layers are searched also where the budget would move them.

    Args:
        plain: the strategy with the options that are fixed, without a budget.
        budget: of every combination.
        shape: of the runs.
        given: the values of options for which they are not derived.

    Raises:
        OptionError: a composition; a given option that is fixed, or that the budget moves; no option is left.
        BudgetError: the strategy takes no budget.
    """
    name, given = plain.name, given or {}
    if isinstance(plain, Sequence):
        raise OptionError(f"strategy {name!r} is a composition, which has no search space; tune its parts one by one")
    if not plain.takes_budget():
        raise BudgetError(f"strategy {name!r} has nothing that a budget could move, so nothing to tune under one")
    known, fixed = plain.Options.model_fields, plain.options.model_fields_set
    moved = sizes_moved(plain, budget, shape)
    _check_given(plain, given, moved)
    domains: dict[str, Domain] = {}
    left_out: dict[str, str] = {}
    for option, about in known.items():
        if option in given:
            domains[option] = given[option]
        elif option in fixed:
            left_out[option] = "fixed"
        elif option in moved:
            left_out[option] = "the budget moves it"
        else:
            found = _allowed(plain, option, _derive(plain, option, about, shape.layers))
            if isinstance(found, str):
                left_out[option] = found
            else:
                domains[option] = found
    for option, why in _never_effective(plain, budget, domains).items():
        if option in given:
            raise OptionError(f"strategy {name!r}: option {option!r} has no effect {why}; leave it out of --search")
        left_out[option] = f"no effect {why}"
        del domains[option]
    if not domains:
        told = "; ".join(f"{option}: {why}" for option, why in left_out.items())
        raise OptionError(f"strategy {name!r} has no option to search ({told}); {GIVE}")
    return Space(domains, left_out)


def sizes_moved(plain: Strategy, budget: float, shape: Shape) -> set[str]:
    """The options that hold numbers of tokens and that the budget moves."""
    found = {plain.budget_option} if plain.budget_option is not None else set()
    with suppress(BudgetError), blamed_strategy(plain.name, ": solve_budget()"):  # others may meet it
        found |= set(plain.solve_budget(budget, shape)) - plain.options.model_fields_set
    known = plain.Options.model_fields
    return {option for option in found if option in known and not _is_layer(option, known[option])}


def _check_given(plain: Strategy, given: Mapping[str, Domain], moved: set[str]) -> None:
    fixed = plain.options.model_fields_set
    for option in given:
        if option in fixed:
            raise OptionError(f"option {option!r} is fixed (-o) and searched (--search); leave one out")
    taken = plain.budget_option if plain.budget_option in {*given, *fixed} else None
    if taken is not None or not moved - set(given):
        names = taken or ", ".join(sorted(moved or {*given}))
        raise OptionError(
            f"strategy {plain.name!r}: option {names!r} is what the budget moves to make all combinations cost the "
            "same; leave it out of -o and --search"
        )


def _is_layer(option: str, about: FieldInfo) -> bool:
    return option.startswith("layer") or option.endswith("_layer") or _of_type(about, Depth)


def _of_type(about: FieldInfo, annotated: Any) -> bool:
    """Whether a field has one of the types of `core.options`, alone or in a union."""
    union = [part for kind in get_args(about.annotation) for part in getattr(kind, "__metadata__", ())]
    return any(part in [*about.metadata, *union] for part in annotated.__metadata__)


def _derive(plain: Strategy, option: str, about: FieldInfo, layers: int) -> Domain | str:
    """The values of an option, or why there are none."""
    kinds = _kinds(about.annotation)
    default = getattr(plain.options, option)
    if option == "seed":
        return "a draw, not a setting"
    if kinds and all(get_origin(kind) is Literal for kind in kinds):
        return Choices(tuple(value for kind in kinds for value in get_args(kind)))
    if kinds == {bool}:
        return Choices((False, True))
    if any(get_origin(kind) is tuple for kind in kinds):
        if _is_layer(option, about) and isinstance(default, tuple):
            return Choices(tuple(_ladders(len(default), layers)))
        return f"a list; {GIVE}"
    if not kinds <= {int, float}:
        return f"not a number, a choice or a switch; {GIVE}"
    if _of_type(about, Amount):
        return Range(1 / STEPS, 1.0)
    if _is_layer(option, about) and int in kinds:
        low = _bound(about, "ge", "gt", 1)
        return Range(int(low if low is not None else _of_type(about, Depth)), layers - 1)
    return _numbers(about, kinds, default)


def _numbers(about: FieldInfo, kinds: set[Any], default: Any) -> Domain | str:
    """A range within the bounds; without an upper one, up to 1 if the default is a share, else up to 4 defaults."""
    if not isinstance(default, (int, float)):
        return f"a number without a default; {GIVE}"
    share = float in kinds and 0 <= default <= 1
    step = 1 if kinds == {int} else (1 / STEPS if share else abs(default) / STEPS)
    low, high = _bound(about, "ge", "gt", step), _bound(about, "le", "lt", -step)
    low = min(0, default) if low is None else low
    high = (1 if share else max(WIDER * default, low + WIDER)) if high is None else high
    if high <= low:
        return "has one value only"
    return Range(int(low), int(high)) if kinds == {int} else Range(float(low), float(high))


def _bound(about: FieldInfo, closed: str, open_: str, step: float) -> Any:
    for part in about.metadata:
        if getattr(part, closed, None) is not None:
            return getattr(part, closed)
        if getattr(part, open_, None) is not None:
            return getattr(part, open_) + step
    return None


def _kinds(annotation: Any) -> set[Any]:
    """The types of a union without None, and without what annotates them."""
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part) if kind is not type(None)}
    return _kinds(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else {annotation}


def _ladders(count: int, layers: int) -> Iterator[tuple[int, ...]]:
    """Evenly spaced layers, beginning in the first half of the depth, at most a quarter of it apart."""
    eighth = max(1, layers // 8)
    for first in sorted({1, *range(eighth, layers // 2 + 1, eighth)}):
        for apart in sorted({max(1, layers // parts) for parts in (16, 8, 6, 4)}) if count > 1 else (1,):
            if first + (count - 1) * apart < layers:
                yield tuple(first + apart * number for number in range(count))


def _allowed(plain: Strategy, option: str, found: Domain | str) -> Domain | str:
    """Choices without those that the options refuse."""
    if not isinstance(found, Choices):
        return found
    kept = []
    for value in found.values:
        with suppress(TokenPruneError, ValueError):
            plain.Options(**{option: value})
            kept.append(value)
    return Choices(tuple(kept)) if len(kept) > 1 else "has one value only"


def _never_effective(plain: Strategy, budget: float, domains: Mapping[str, Domain]) -> Mapping[str, str]:
    """Searched options that have no effect whichever value another one has, with the reason."""
    fixed = {option: getattr(plain.options, option) for option in plain.options.model_fields_set}
    changes: list[dict[str, Any]] = [{}]
    for option, domain in domains.items():
        every = domain.values
        changes += [{option: value} for value in every[:: max(1, len(every) // SAMPLES)]]
    found: list[Mapping[str, str]] = []
    for change in changes:
        with suppress(OptionError), blamed_strategy(plain.name, ": without_effect()"):
            found.append(type(plain)(budget=budget, **{**fixed, **change}).without_effect())
    first = found[0] if found else {}
    return {option: first[option] for option in first if option in domains and all(option in one for one in found)}
