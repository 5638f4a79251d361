"""The search of `tune`: which combinations are run next, and what each of them gave.

The store holds the results, and nothing else of a search is kept: a search that goes on asks the same sampler for the
same combinations, and finds those that are finished in the store.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tokenprune import api
from tokenprune.core.stage import Shape
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, InputError, TokenPruneError
from tokenprune.evaluation.contenders import Contender
from tokenprune.plugins.attribution import blamed_strategy
from tokenprune.sweeps.tuning.search_space import Choices, Range, Space
from tokenprune.utils.extras import install_extra

BATCH = 5  # combinations that run side by side, on images that are encoded once
ASKED = 10  # times the trials: combinations that are asked for at most, where most are refused


@dataclass(frozen=True)
class Outcome:
    """What running a combination gave.

    Attributes:
        ious: of the queries; empty if it could not run.
        reason: why it could not run.
    """

    ious: tuple[float, ...] = ()
    reason: str | None = None

    @property
    def giou(self) -> float:
        """The mean."""
        return sum(self.ious) / len(self.ious)


@dataclass(frozen=True)
class Trial:
    """One combination that the sampler asked for.

    Attributes:
        number: in the order of asking.
        options: of the combination, those without effect left out.
        giou: on the calibration queries; None if it was refused.
        reason: why it was refused.
        repeats: the number of an earlier trial with the same options.
    """

    number: int
    options: dict[str, Any]
    giou: float | None = None
    reason: str | None = None
    repeats: int | None = None


@dataclass
class Search:
    """All trials of a search, and the combinations that ran.

    Attributes:
        trials: in the order of asking.
        ran: the outcomes of those that ran, by the number of the trial.
        contenders: of these.
    """

    trials: list[Trial] = field(default_factory=list)
    ran: dict[int, Outcome] = field(default_factory=dict)
    contenders: dict[int, Contender] = field(default_factory=dict)

    @property
    def refused(self) -> list[Trial]:
        """Trials that could not run."""
        return [trial for trial in self.trials if trial.reason is not None and trial.repeats is None]

    @property
    def repeated(self) -> int:
        """Trials with the options of an earlier one."""
        return sum(trial.repeats is not None for trial in self.trials)

    def number_of(self, options: Mapping[str, Any]) -> int | None:
        """The first trial with these options, if there is one."""
        return next((trial.number for trial in self.trials if trial.options == options), None)

    def add(self, number: int, contender: Contender, outcome: Outcome) -> None:
        """What running a trial gave."""
        if outcome.reason is None:
            self.ran[number], self.contenders[number] = outcome, contender
            self.trials[number] = replace(self.trials[number], giou=outcome.giou)
        else:
            self.trials[number] = replace(self.trials[number], reason=outcome.reason)

    def best(self, count: int) -> list[int]:
        """Numbers of the trials of highest gIoU; those that gave equal IoUs on all queries count as one."""
        order = sorted(self.ran, key=lambda number: (-self.ran[number].giou, number))
        found: dict[tuple[float, ...], int] = {}
        for number in order:
            found.setdefault(self.ran[number].ious, number)
        return list(found.values())[:count]


def check_optuna() -> Any:
    """The module optuna. Raises InputError if it is not installed."""
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise InputError(f"optuna, which searches options, is not installed; {install_extra('tune')}") from None


def contender_of(name: str, budget: float, fixed: Mapping[str, Any], options: Mapping[str, Any]) -> Contender:
    """A strategy with a combination of options, those without effect left out.

    Raises:
        OptionError, BudgetError: the strategy refuses it.
    """
    plain = api.strategy(name, **fixed)
    with blamed_strategy(name, ": without_effect()"):
        idle = type(plain)(budget=budget, **{**fixed, **options}).without_effect()
    given = {**fixed, **{option: value for option, value in options.items() if option not in idle}}
    return Contender(api.strategy(name, budget, **given), given, budget)


def search(
    plain: Strategy,
    budget: float,
    shape: Shape,
    space: Space,
    trials: int,
    seed: int,
    evaluate: Callable[[Sequence[Contender]], Sequence[Outcome]],
    told: Callable[[Search], None] | None = None,
) -> Search:
    """Search for the combination of highest gIoU.

    A space of at most `trials` combinations is run as a whole; a larger one is sampled by Optuna's TPE.

    Args:
        plain: the strategy with the options that are fixed, without a budget.
        budget: of every combination.
        shape: of the first query; what is refused on it does not run.
        space: of the combinations.
        trials: combinations to run; refused and repeated ones do not count.
        seed: of the sampler.
        evaluate: runs several combinations side by side.
        told: called after each batch.

    Raises:
        BudgetError: no combination could run.
    """
    sampler, found = Sampler(space, trials, seed), Search()
    fixed = {option: getattr(plain.options, option) for option in plain.options.model_fields_set}
    most = min(space.size, ASKED * trials) if sampler.whole else ASKED * trials
    while len(found.ran) < trials and len(found.trials) < most:
        fresh: dict[int, tuple[Any, Contender]] = {}
        others: list[tuple[Any, int]] = []  # trials that need no run, each with the number of its own or an equal one
        for _ in range(min(BATCH, most - len(found.trials))):
            if len(found.ran) + len(fresh) == trials:  # cut the last batch; with more trials it begins with the same
                break
            asked, options = sampler.ask()
            number = len(found.trials)
            try:
                contender = contender_of(plain.name, budget, fixed, options)
                contender.strategy.bind(shape)
            except TokenPruneError as error:
                found.trials.append(Trial(number, options, reason=str(error)))
                others.append((asked, number))
                continue
            options = {option: value for option, value in contender.given.items() if option not in fixed}
            first = found.number_of(options)
            found.trials.append(Trial(number, options, repeats=first))
            if first is None:
                fresh[number] = asked, contender
            else:
                others.append((asked, first))
        outcomes = evaluate([contender for _, contender in fresh.values()]) if fresh else []
        for (number, (asked, contender)), outcome in zip(fresh.items(), outcomes, strict=True):
            found.add(number, contender, outcome)
            sampler.tell(asked, found.ran.get(number))
        for asked, number in others:
            sampler.tell(asked, found.ran.get(number))
        if told is not None:
            told(found)
    if not found.ran:
        _, example = next(iter(summed(found.refused).values()))
        raise BudgetError(f"strategy {plain.name!r}: none of {len(found.trials)} combinations could run: {example}")
    return found


class Sampler:
    """Optuna's TPE, or all combinations if they are few.

    Attributes:
        whole: whether all combinations are asked for.
    """

    def __init__(self, space: Space, trials: int, seed: int) -> None:
        self._optuna, self._domains = check_optuna(), space.domains
        level = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        try:
            sampler = self._optuna.samplers.TPESampler(seed=seed)
            self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        finally:
            self._optuna.logging.set_verbosity(level)
        # places among the values, so that a real number is exactly the same in all runs
        places = [range(len(domain.values)) for domain in self._domains.values()]
        self._distributions = {
            option: self._distribution(domain, len(every))
            for (option, domain), every in zip(self._domains.items(), places, strict=True)
        }
        self.whole = space.size <= trials
        for combination in product(*places) if self.whole else ():
            self._study.enqueue_trial(dict(zip(self._domains, combination, strict=True)))

    def ask(self) -> tuple[Any, dict[str, Any]]:
        """Optuna's trial, and the values of a combination."""
        trial = self._study.ask(self._distributions)
        return trial, {option: domain.values[trial.params[option]] for option, domain in self._domains.items()}

    def tell(self, trial: Any, outcome: Outcome | None) -> None:
        """What a trial gave; None = it was refused."""
        if outcome is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, outcome.giou)

    def _distribution(self, domain: Choices | Range, count: int) -> Any:
        if isinstance(domain, Choices):
            return self._optuna.distributions.CategoricalDistribution(list(range(count)))
        return self._optuna.distributions.IntDistribution(0, count - 1)


def summed(refused: Sequence[Trial]) -> dict[str, tuple[int, str]]:
    """How many trials were refused for the same reason but for its numbers, most first, with an example of each."""
    found: dict[str, tuple[int, str]] = {}
    for trial in refused:
        reason = str(trial.reason)
        kind = "".join("#" if character.isdigit() else character for character in reason.split(" with options ")[0])
        while "##" in kind:
            kind = kind.replace("##", "#")
        count, example = found.get(kind, (0, reason))
        found[kind] = count + 1, example
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
