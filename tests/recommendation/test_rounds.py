"""Rounds of measurements within a given time, on a clock of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import EngineError
from tokenprune.recommendation.rounds import LEAST, OVERRUN, Cell, Rounds


class Clock:
    """A clock that runs only while something runs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, name: str = "") -> Callable[[], object]:
        """A run that takes so long."""

        def run() -> None:
            self.now += seconds
            self.ran.append(name)

        return run


def cell(clock: Clock, tokens: int, untouched: float, *contenders: float) -> Cell:
    runs = {number: clock.taking(seconds, f"{tokens}/{number}") for number, seconds in enumerate(contenders)}
    return Cell(tokens, 1, clock.taking(untouched, f"{tokens}/none"), runs)


def test_every_run_is_timed_alone_and_each_round_starts_with_another() -> None:
    clock = Clock()
    made = cell(clock, 64, 2.0, 1.0, 3.0)
    assert Rounds([made], 1e6, most=7, clock=clock).run() == 7
    assert made.seconds == {None: [2.0] * 7, 0: [1.0] * 7, 1: [3.0] * 7}
    measured = clock.ran[-21:]
    assert [measured[place] for place in (0, 3, 6, 9)] == ["64/none", "64/0", "64/1", "64/none"]
    assert all(sorted(measured[place : place + 3]) == ["64/0", "64/1", "64/none"] for place in range(0, 21, 3))


def test_sizes_for_which_there_is_no_time_are_left_out_with_what_they_need() -> None:
    clock = Clock()
    small, large = cell(clock, 64, 1.0, 1.0), cell(clock, 256, 5.0, 4.0)
    assert Rounds([large, small], 60, clock=clock).run() == 26  # of 2 s: the warm-up took 1 + 1 + 1 + 5 s
    assert not small.needs
    assert large.needs == 5 * 2 * (LEAST + 1)
    assert large.seconds == {}


def test_sizes_that_are_clearly_too_large_do_not_even_run_once() -> None:
    clock = Clock()
    small, large = cell(clock, 64, 1.0, 1.0), cell(clock, 1024, 50.0, 40.0)
    assert Rounds([large, small], 60, clock=clock).run() == 28  # of 2 s: the warm-up took 3 s
    assert not any(name.startswith("1024") for name in clock.ran)
    assert large.needs == 16 * 2 * (LEAST + 1)  # as if time were proportional


def test_the_preferred_size_has_its_time_first() -> None:
    clock = Clock()
    cells = [cell(clock, tokens, tokens / 64, tokens / 64) for tokens in (64, 128, 256, 512)]
    assert Rounds(cells, 80, clock=clock, first=256).run() >= LEAST
    assert [bool(one.needs) for one in cells] == [False, True, False, True]
    assert clock.ran[:4] == ["64/none", "64/none", "256/none", "256/0"]
    again = [cell(clock, tokens, tokens / 64, tokens / 64) for tokens in (64, 128, 256, 512)]
    Rounds(again, 80, clock=clock).run()
    assert [bool(one.needs) for one in again] == [False, False, True, True]


def test_a_preferred_size_for_which_there_is_no_time_leaves_it_to_the_others() -> None:
    clock = Clock()
    small, large = cell(clock, 64, 1.0, 1.0), cell(clock, 1024, 50.0, 40.0)
    assert Rounds([large, small], 60, clock=clock, first=1024).run() == 28
    assert not any(name.startswith("1024") for name in clock.ran)


def test_a_size_that_proves_slow_only_with_its_contenders_is_left_out_too() -> None:
    clock = Clock()
    made = cell(clock, 64, 1.0, 100.0)
    assert Rounds([made], 60, clock=clock).run() == 0
    assert made.needs == 101 * LEAST


def test_what_raises_is_left_out_with_its_reason_and_the_others_run() -> None:
    clock, calls = Clock(), [0]

    def failing() -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise EngineError("it is too long")

    made = cell(clock, 64, 1.0, 1.0)
    made.contenders[5] = failing
    assert Rounds([made], 1e6, most=8, clock=clock).run() == 8
    assert made.reasons == {5: "it is too long"}
    assert made.seconds == {None: [1.0] * 8, 0: [1.0] * 8}


def test_foreign_errors_are_not_hidden() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    clock = Clock()
    made = cell(clock, 64, 1.0)
    made.contenders[0] = broken
    with pytest.raises(ZeroDivisionError):
        Rounds([made], 1e6, clock=clock).run()


SECONDS = st.floats(0.01, 20)
CELLS = st.lists(st.tuples(SECONDS, st.lists(SECONDS, max_size=4)), min_size=1, max_size=4)


@given(CELLS, st.floats(1e-6, 300), st.integers(1, 30))
def test_times_are_even_and_within_the_limit(sizes: list[tuple[float, list[float]]], limit: float, most: int) -> None:
    clock, steps = Clock(), []
    cells = [cell(clock, 10 * (n + 1), untouched, *others) for n, (untouched, others) in enumerate(sizes)]
    rounds = Rounds(cells, limit, most, clock, progress=lambda what, done, total: steps.append((what, done, total)))
    found = rounds.run()
    assert found <= most
    for made in cells:
        lengths = {len(values) for values in made.seconds.values()}
        assert lengths <= {found}
        assert bool(lengths) != bool(made.needs)
    probes = sum(untouched for untouched, _ in sizes) + sizes[0][0]  # what has to run before it can be known
    probes += sum(sum(others) for (_, others), made in zip(sizes, cells, strict=True) if made.needs)
    one_round = sum(made.round_seconds for made in cells if not made.needs)
    assert clock.now - 100 <= max(limit * OVERRUN, 0) + one_round + probes
    assert all(0 <= done <= total for _, done, total in steps)
    if found:
        assert steps[-1][1] == steps[-1][2]
