"""The conformance kit for strategies: three lines test what tokenprune guarantees for any strategy.

from tokenprune.testing.strategy_conformance import StrategyConformance

class TestMyMethod(StrategyConformance):
    strategy = "my-method"
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, NoReturn

from tokenprune.utils.extras import install_extra

try:
    import hypothesis
    import pytest
    from hypothesis import strategies as st
except ImportError as missing:
    raise ImportError(
        f"tokenprune.testing.strategy_conformance needs pytest and hypothesis, and found no module {missing.name!r}; "
        f"{install_extra('test')}"
    ) from missing

from tokenprune import api
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.errors import BudgetError, IncompatibleError, OptionError, PluginError, TokenPruneError
from tokenprune.plugins import registry
from tokenprune.testing.kit import invariants
from tokenprune.testing.kit.cases import Case, Row, SyntheticBatch
from tokenprune.testing.kit.decoder_families import FAMILIES, WIDTH, model_of
from tokenprune.testing.kit.synthetic_vision import synthetic_vision_of
from tokenprune.testing.kit.verdict import Nonconforming, NotTested, Tied, raised, report

Invariant = Callable[[Case, Strategy], None]


@st.composite
def cases(draw: Any, families: Iterable[str], budgets: Iterable[float | None], most_rows: int = 3) -> Case:
    """Random cases: one to three rows with one or two images each, of equal or different sizes, and padding."""

    def images() -> tuple[tuple[int, int], ...]:
        side = st.integers(1, 6)
        return tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=2)))

    count = draw(st.integers(1, most_rows))
    shared = images() if draw(st.booleans()) else None
    rows = tuple(
        Row(
            images() if shared is None else shared,
            before=draw(st.integers(1, 4)),
            after=draw(st.integers(1, 6)),
            seed=10 * draw(st.integers(0, 999)) + number,
        )
        for number in range(count)
    )
    return Case(
        draw(st.sampled_from(list(families))),
        rows,
        draw(st.sampled_from(["right", "left"])),
        draw(st.sampled_from(list(budgets))),
    )


class StrategyConformance:
    """Subclass it and define `strategy`; pytest does the rest.

    Attributes:
        strategy: a registered name, or a function without arguments that makes the strategy. In a class body, write
            `staticmethod(...)` around a lambda or function; a strategy class can be given as it is.
        options: options for a strategy that is given by name.
        examples: examples per invariant.
        budgets: budgets to test in addition to the given options.
        budget_slack: a row must be less than this many equivalent tokens below its budget; None = not checked. By
            default 1 for strategies that do not override the base class's solver.
    """

    strategy: ClassVar[Any] = None
    options: ClassVar[Mapping[str, Any]] = {}
    examples: ClassVar[int] = 10
    budgets: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)
    budget_slack: ClassVar[float | None] = None

    # invariants ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_engine_equals_masked_oracle(self, request: pytest.FixtureRequest, family: str) -> None:
        """On every kind of decoder, a run equals the masked full-length oracle with the same decisions."""
        self._hold(request, invariants.equals_oracle, families=[family])

    def test_keep_all_is_the_baseline(self, request: pytest.FixtureRequest) -> None:
        """With all tokens kept, outputs equal the untouched model's, to the bit if positions are kept."""
        self._hold(request, invariants.keep_all_is_the_baseline, budgets=[None])

    def test_batch_row_equals_row_alone(self, request: pytest.FixtureRequest) -> None:
        """A row gives the same in a batch as alone."""
        self._hold(request, invariants.row_equals_row_alone)

    def test_cached_equals_recomputed(self, request: pytest.FixtureRequest) -> None:
        """Decoding on the pruned cache equals recomputation."""
        self._hold(request, invariants.cached_equals_recomputed)

    def test_budget_is_met(self, request: pytest.FixtureRequest) -> None:
        """Budgets are never exceeded, and used up to `budget_slack`."""
        slack = self.budget_slack
        kind = type(self.made())
        own = kind.budget_ladders, kind.solve_budget
        if slack is None and kind.budget_option and own == (Strategy.budget_ladders, Strategy.solve_budget):
            slack = 1.0
        self._hold(request, partial(invariants.budget_is_met, slack=slack), budgets=self.budgets)

    def test_budget_is_monotone(self, request: pytest.FixtureRequest) -> None:
        """A larger budget spends no fewer tokens."""
        self._hold(request, _monotone, budgets=sorted(self.budgets)[1:])

    def test_deterministic_under_a_seed(self, request: pytest.FixtureRequest) -> None:
        """Two runs are equal, independent of the state of global random generators."""
        self._hold(request, invariants.deterministic_under_a_seed)

    def test_order_and_positions_are_kept(self, request: pytest.FixtureRequest) -> None:
        """Layers are given tokens in order, at the positions of the policy."""
        self._hold(request, invariants.order_and_positions_are_kept)

    def test_restore_restores(self, request: pytest.FixtureRequest) -> None:
        """Restored tokens come back as they were parked."""
        self._hold(request, invariants.restore_restores)

    def test_inputs_are_not_modified(self, request: pytest.FixtureRequest) -> None:
        """Tensors that the strategy is given are not modified."""
        self._hold(request, invariants.nothing_lent_is_written_to)

    def test_no_hook_is_left(self, request: pytest.FixtureRequest) -> None:
        """The model is unchanged after runs and after exceptions."""
        self._hold(request, invariants.no_hook_is_left)

    def test_ledger_equals_what_entered(self, request: pytest.FixtureRequest) -> None:
        """The ledger equals the counts of hooks on the layers."""
        self._hold(request, invariants.ledger_equals_what_entered)

    # ------------------------------------------------------------------------------------------------------------------

    def made(self) -> Strategy:
        """A new instance of the strategy."""
        given = type(self).__dict__.get("strategy", self.strategy)
        given = self.__dict__.get("strategy", given)
        given = given.__func__ if isinstance(given, staticmethod) else given
        if isinstance(given, str):
            return api.strategy(given, **self.options)
        if not callable(given):
            raise pytest.UsageError(
                f"{type(self).__name__}.strategy: found {given!r}, expected the name of a strategy or a function "
                "without arguments that makes one"
            )
        made = given(**self.options)
        if not isinstance(made, Strategy):
            raise pytest.UsageError(
                f"{type(self).__name__}.strategy: made {type(made).__name__}, expected a tokenprune.Strategy"
            )
        return made

    def _hold(
        self,
        request: pytest.FixtureRequest,
        invariant: Invariant,
        *,
        families: Iterable[str] = tuple(FAMILIES),
        budgets: Iterable[float | None] | None = None,
    ) -> None:
        """Test random cases; fails with the smallest failing one, skips if none could be tested."""
        __tracebackhide__ = True  # the failure message is complete
        found = ""
        try:
            fitting, reasons = self._fitting(families)
        except TokenPruneError as error:  # the strategy cannot be made, or its stages cannot be declared
            found = raised(error)
        if found:
            self._fail(request, found)
        if not fitting:
            pytest.skip("; ".join(reasons))
        tried = 0
        why: list[str] = []
        seed = _seed_of(request.config)
        wanted = (None, *self.budgets) if budgets is None else budgets

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            print_blob=False,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=cases(fitting, wanted))
        def holds(case: Case) -> None:
            __tracebackhide__ = True
            nonlocal tried
            if not tried and len(why) >= 10 * self.examples:
                return  # so are the cases that remain, of which hypothesis would draw hundreds
            strategy = self.made()
            try:
                invariant(case, strategy)
            except Tied as tie:
                why.append(str(tie))
                hypothesis.reject()  # another case is drawn for it
            except NotTested as reason:
                why.append(str(reason))
            except (BudgetError, OptionError, IncompatibleError) as refusal:
                why.append(str(refusal))
                hypothesis.reject()  # another case is drawn for it
            except Nonconforming as problem:
                raise Nonconforming(f"{problem}\n{self._again(request, seed)}") from problem.__cause__
            except Exception as error:  # any exception is reported with the case
                failure = report(raised(error, strategy), strategy, case)
                failed = Nonconforming(f"{failure}\n{self._again(request, seed)}")
                raise failed from (None if "\nraised at\n" in str(failure) or isinstance(error, PluginError) else error)
            else:
                tried += 1

        try:
            with suppress(hypothesis.errors.Unsatisfiable):  # every case was refused
                holds()
        except Nonconforming as failure:
            if failure.__cause__ is not None:
                raise  # with the traceback through the strategy
            found = str(failure)
        if found:
            self._fail(request, found)
        if not tried:
            pytest.skip(f"not tested: {why[0]}" if why else "not tested: no case was drawn")

    def _fail(self, request: pytest.FixtureRequest, report: str) -> NoReturn:
        """Fail with this report; shortened if an earlier test failed with the same first line."""
        __tracebackhide__ = True
        line = report.splitlines()[0]
        key = (request.node.parent.nodeid, repr(self.strategy), re.sub(r"\d+", "", line))
        first = _told.setdefault(key, request.node.name)
        pytest.fail(report if first == request.node.name else f"as in {first}: {line}", pytrace=False)

    def _fitting(self, families: Iterable[str]) -> tuple[list[str], list[str]]:
        """The families that the strategy runs on, and the reasons for the others."""
        fitting, reasons = [], []
        made = SyntheticBatch((Row(((2, 2),)),), "right")
        for family in families:
            try:
                with prune(
                    model_of(family),
                    self.made(),
                    image_tokens=made.layout.image_tokens,
                    vision=synthetic_vision_of(made, WIDTH),
                ):
                    fitting.append(family)
            except IncompatibleError as error:
                reasons.append(f"{family} ({FAMILIES[family].summary}): {error}")
        return fitting, reasons

    def _again(self, request: pytest.FixtureRequest, seed: int) -> str:
        """The command that runs the failing test again."""
        given, test = self.strategy, request.node.originalname
        same = all(getattr(self, name) == getattr(StrategyConformance, name) for name in _SETTINGS)
        if isinstance(given, str) and given in registry.strategies() and same:
            words = ["pytest", "--tokenprune-strategy", given]
            for key, value in self.options.items():
                words += ["--tokenprune-options", f"{key}={value}"]
            family = request.node.callspec.params.get("family") if hasattr(request.node, "callspec") else None
            words += ["-k", f"{test} and {family}" if family else test]
        else:
            words = ["pytest", request.node.nodeid]
        return "again     " + shlex.join([*words, f"--hypothesis-seed={seed}"])


def _monotone(case: Case, strategy: Strategy) -> None:
    assert case.budget is not None
    for less in (case.budget - 0.25, case.budget - 0.05):
        if less > 0:
            invariants.budget_is_monotone(case, strategy, less)


_SETTINGS = ("examples", "budgets", "budget_slack")
_drawn_seed: list[int] = []
_told: dict[tuple[str, ...], str] = {}  # of this session: what failed, and the test that said so first


def _seed_of(config: pytest.Config) -> int:
    """`--hypothesis-seed`, or one number drawn for the whole session."""
    given = config.getoption("--hypothesis-seed", None)
    if given is not None and str(given).isdigit():
        return int(given)
    if not _drawn_seed:
        _drawn_seed.append(secrets.randbelow(2**32))
    return _drawn_seed[0]
