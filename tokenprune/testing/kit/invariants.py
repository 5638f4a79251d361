"""Invariants of every strategy: each function takes a case and a strategy, and raises if it does not hold."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.decisions import Restore
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.errors import PluginError, TokenPruneError
from tokenprune.testing.kit.cases import Case, SyntheticBatch
from tokenprune.testing.kit.decoder_families import FAMILIES, WIDTH, model_of, stack_of
from tokenprune.testing.kit.model_snapshot import differences, snapshot
from tokenprune.testing.kit.printing import ranges
from tokenprune.testing.kit.recording import Break, Breaking, Run, baseline, joined, run
from tokenprune.testing.kit.verdict import NotTested, Tied, report
from tokenprune.testing.oracle import all_active, apply_step, masked_full_length, rotary_tables

TOLERANCE = 1e-4
"""Largest difference of final states (of size about 1) that rounding explains."""


def equals_oracle(case: Case, strategy: Strategy) -> None:
    """The engine equals the oracle: full-length layers with masks."""
    done = run(case, strategy)
    _close(done.output, _oracle(case, strategy, done), done, case, strategy, "the engine", "the masked oracle")


def cached_equals_recomputed(case: Case, strategy: Strategy) -> None:
    """Tokens decoded one by one on the pruned cache equal those of the whole longer sequence."""
    case = replace(case, padding="left")
    done = run(case, strategy, new=3)
    expected = _oracle(case, strategy, done, new=3)[:, -3:]
    _close(done.decoded, expected, done, case, strategy, "cached decoding", "recomputation", first=done.made.length)


def keep_all_is_the_baseline(case: Case, strategy: Strategy) -> None:
    """Without pruning, everything equals the untouched model: to the bit, unless positions are renumbered.

    Renumbering leaves padding out, which changes the order of sums.
    """
    done = run(replace(case, budget=1.0), strategy)
    for stage in done.trace.stages:
        if not torch.equal(stage.active, done.trace.exists) or stage.kind == "merge":
            raise NotTested(f"at budget 1.0 its stage {stage.name!r} does not keep all tokens as they are")
    valid = done.made.layout.valid
    if any(step.decision.values is not None for step in done.log.steps):
        raise NotTested("it gives tokens new states even at budget 1.0")
    expected, _ = baseline(case)
    gap = float((done.output - expected)[valid].abs().max())
    exact = all(step.positions == "keep" for step in done.log.steps)
    if not gap <= (0 if exact else TOLERANCE):
        problem = f"all tokens are kept, and the final states differ from the untouched model's by {gap:.2g}"
        raise report(problem, strategy, case, done.trace)


def row_equals_row_alone(case: Case, strategy: Strategy) -> None:
    """A row of a batch gives the same decisions and states as alone."""
    done = run(case, strategy)
    for row in range(len(case.rows)):
        alone = run(case.alone(row), strategy)
        for together, single in zip(done.trace.stages_of(row), alone.trace.stages, strict=True):
            for what in ("active", "parked"):
                here = getattr(together, what)[row].nonzero().flatten().tolist()
                there = getattr(single, what)[0].nonzero().flatten().tolist()
                if here != there:
                    _refuse_tie(case.alone(row), strategy, alone, f"row {row}, stage {together.name!r}")
                    problem = (
                        f"row {row}, stage {together.name!r}: {what} tokens {ranges(here)} in the batch, "
                        f"{ranges(there)} alone; choose for every row from what belongs to that row"
                    )
                    raise report(problem, strategy, case, done.trace)
        here, there = done.made.layout.valid[row], alone.made.layout.valid[0]
        gap = float((done.output[row, here] - alone.output[0, there]).abs().max())
        if not gap < TOLERANCE:
            problem = f"row {row}: final states differ by {gap:.2g} from those of the row alone"
            raise report(problem, strategy, case, done.trace)


def budget_is_met(case: Case, strategy: Strategy, slack: float | None) -> None:
    """No row spends more equivalent tokens than its budget, nor `slack` tokens or more below it."""
    done = run(case, strategy)
    assert case.budget is not None
    for row, total in enumerate(done.trace.ledger.image_tokens):
        spent = sum(entry.image[row] for entry in done.trace.ledger.entries) / len(done.trace.ledger.entries)
        allowed = case.budget * total
        if spent > allowed + 1e-6:
            problem = f"row {row} spends {spent:.3f} equivalent tokens, above the budget's {allowed:.3f}"
            raise report(f"{problem} ({case.budget:g} of {total})", strategy, case, done.trace)
        if slack is not None and spent <= allowed - slack - 1e-6:
            problem = f"row {row} spends {spent:.3f} equivalent tokens, {slack:g} or more below the budget's "
            raise report(f"{problem}{allowed:.3f} ({case.budget:g} of {total})", strategy, case, done.trace)


def budget_is_monotone(case: Case, strategy: Strategy, less: float) -> None:
    """A larger budget spends no less, and can be met if a smaller one can."""
    done = run(replace(case, budget=less), strategy)
    try:
        more = run(case, strategy)
    except PluginError:  # an error of the strategy, not a refusal
        raise
    except TokenPruneError as error:
        problem = f"budget {less:g} is met, and {case.budget:g} is refused: {error}"
        raise report(problem, strategy, case, done.trace) from error
    for row in range(len(case.rows)):
        low, high = (sum(entry.image[row] for entry in one.trace.ledger.entries) for one in (done, more))
        if low > high:
            layers = len(more.trace.ledger.entries)
            problem = (
                f"row {row} spends {low / layers:.3f} equivalent tokens at budget {less:g}, and only "
                f"{high / layers:.3f} at {case.budget:g}"
            )
            raise report(problem, strategy, case, more.trace)


def deterministic_under_a_seed(case: Case, strategy: Strategy) -> None:
    """Equal inputs and seeds give equal results, independent of the state of global random generators."""
    found = []
    for seed in (1, 2):
        state, python = torch.get_rng_state(), random.getstate()
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            found.append(run(case, strategy))
        finally:
            torch.set_rng_state(state)
            random.setstate(python)
    one, two = found
    for first, second in zip(one.trace.stages, two.trace.stages, strict=True):
        if first.kept != second.kept:
            row = next(r for r in range(len(case.rows)) if first.kept[r] != second.kept[r])
            problem = (
                f"stage {first.name!r}, row {row}: tokens {ranges(first.kept[row])} in one run, "
                f"{ranges(second.kept[row])} in the next; draw from tokens.generator(seed)"
            )
            raise report(problem, strategy, case, one.trace)
    if not torch.equal(one.output, two.output):
        raise report("two runs of the same inputs give other final states", strategy, case, one.trace)


def order_and_positions_are_kept(case: Case, strategy: Strategy) -> None:
    """Every layer gets its tokens in the order of the sequence, at the positions of the policy."""
    done = run(case, strategy)
    stack = stack_of(model_of(case.family))
    ids = FAMILIES[case.family].positions(done.made)
    for layer, table in enumerate(done.log.tables):
        present = _present(done, layer)
        counted = (present.long().cumsum(1) - 1).clamp(min=0)
        for step in done.log.steps:
            if step.layer == layer and step.positions == "renumber":
                ids = counted if step.rows is None else torch.where(step.rows[:, None], counted, ids)
        full = joined(rotary_tables(stack, layer, done.log.entered[layer], ids), len(present))
        for row in range(len(present)):
            places = _places(done, layer, row)
            if len(places) > table.shape[1] or not torch.allclose(table[row, : len(places)], full[row, places]):
                problem = f"layer {layer}, row {row}: the tokens do not stand at positions {ranges(places)} in order"
                raise report(problem, strategy, case, done.trace)


def restore_restores(case: Case, strategy: Strategy) -> None:
    """A restored token has the state that it had when parked, or the one that the strategy gives it."""
    done = run(case, strategy)
    if not any(isinstance(step.decision, Restore) for step in done.log.steps):
        raise NotTested("it never restores a token")
    layout = done.made.layout
    full, alive = done.made.embeds(WIDTH), all_active(layout)
    for layer, (entered, left) in enumerate(zip(done.log.entered, done.log.left, strict=True)):
        for step in done.log.steps:
            if step.layer == layer:
                full = apply_step(step, full, layout, alive)
        back = [step.decision for step in done.log.steps if step.layer == layer and isinstance(step.decision, Restore)]
        for row in range(len(full)):
            places = _places(done, layer, row)
            for number in {n for decision in back for n in decision.index[row].tolist() if n >= 0}:
                slot = int(layout.slots[row, number])
                if slot not in places:
                    continue
                gap = float((entered[row, places.index(slot)] - full[row, slot]).abs().max())
                if not gap < TOLERANCE:
                    problem = f"layer {layer}, row {row}: token {number} comes back {gap:.2g} off its parked state"
                    raise report(problem, strategy, case, done.trace)
            full[row, places] = left[row, : len(places)]


def nothing_lent_is_written_to(case: Case, strategy: Strategy) -> None:
    """Inputs and the tensors of `tokens` are not modified."""
    done = run(case, strategy)
    if done.log.written:
        problem = f"the strategy modifies {', '.join(done.log.written)} in place; work on a clone()"
        raise report(problem, strategy, case, done.trace)


def no_hook_is_left(case: Case, strategy: Strategy) -> None:
    """The model is unchanged, after a run and after one in which the strategy raises."""
    model = model_of(case.family)
    before, expected = snapshot(model), baseline(case)[0]
    done = run(case, strategy)
    _same_model(before, "a run", done.trace, case, strategy)
    if not torch.equal(baseline(case)[0], expected):
        raise report("after a run the untouched model gives other states", strategy, case, done.trace)
    for last in {len(done.log.steps) - 1, 0} if done.log.steps else ():
        with suppress(Break):
            run(case, Breaking(strategy, last))
        _same_model(before, f"an exception in the strategy's choice number {last + 1}", done.trace, case, strategy)
    if not torch.equal(baseline(case)[0], expected):
        raise report("after an exception the untouched model gives other states", strategy, case, done.trace)


def ledger_equals_what_entered(case: Case, strategy: Strategy) -> None:
    """Image tokens and widths in the ledger equal the counts of hooks on the layers."""
    done = run(case, strategy)
    layout, ledger = done.made.layout, done.trace.ledger
    others = (layout.valid.sum(1) - layout.counts).tolist()
    if len(ledger.entries) != len(done.log.tables):
        problem = f"{len(done.log.tables)} layers ran, and the ledger has {len(ledger.entries)}"
        raise report(problem, strategy, case, done.trace)
    counted = []
    for layer, (entry, table) in enumerate(zip(ledger.entries, done.log.tables, strict=True)):
        # real tokens stand at different positions; fillers and padding repeat the position of one of them
        entered = [len(row.unique(dim=0)) - other for row, other in zip(table, others, strict=True)]
        counted += entered
        if list(entry.image) != entered or entry.width != table.shape[1]:
            problem = (
                f"layer {layer}: {entered} image tokens enter at width {table.shape[1]}, and the ledger says "
                f"{list(entry.image)} at width {entry.width}"
            )
            raise report(problem, strategy, case, done.trace)
    mean = sum(counted) / len(counted)
    if abs(mean - ledger.equivalent_tokens) > 1e-6:
        problem = f"{mean:.3f} equivalent tokens entered, and the ledger says {ledger.equivalent_tokens:.3f}"
        raise report(problem, strategy, case, done.trace)


# ----------------------------------------------------------------------------------------------------------------------


def _refuse_tie(case: Case, strategy: Strategy, done: Run, where: str) -> None:
    """Raise Tied if the choice depends on rounding: another order of sums may change it."""
    for noise in (None, *range(8)):
        other = run(case, strategy, noise=noise)
        if [stage.kept for stage in other.trace.stages] != [stage.kept for stage in done.trace.stages]:
            if noise is None:  # chance of another kind
                return
            raise Tied(f"{where}: scores are equal up to rounding, so that what is chosen is chance")


def _same_model(before: dict[str, Any], after: str, trace: Trace, case: Case, strategy: Strategy) -> None:
    left = differences(before, snapshot(model_of(case.family)))
    if left:
        raise report(f"after {after} the model is not as it was: {'; '.join(left[:5])}", strategy, case, trace)


@torch.no_grad()
def _oracle(case: Case, strategy: Strategy, done: Run, new: int = 0) -> Tensor:
    made = SyntheticBatch(case.rows, case.padding, new=new)
    ids = FAMILIES[case.family].positions(made)
    stack = stack_of(model_of(case.family))
    return masked_full_length(stack, made.embeds(WIDTH), made.layout, done.script(strategy), ids, decoded=new)


def _close(
    found: Tensor, expected: Tensor, done: Run, case: Case, strategy: Strategy, one: str, other: str, first: int = 0
) -> None:
    gap = (found - expected).abs().amax(-1)
    if first == 0:
        gap = gap.masked_fill(~done.made.layout.valid, 0)
    if not float(gap.nan_to_num(nan=float("inf")).max()) < TOLERANCE:
        row, place = divmod(int(gap.nan_to_num(nan=float("inf")).argmax()), gap.shape[1])
        problem = f"{one} and {other} differ by {float(gap[row, place]):.2g} in row {row}, position {first + place}"
        raise report(problem, strategy, case, done.trace)


def _present(done: Run, layer: int) -> Tensor:
    """bool [batch, S]: text, and the image tokens that are active in the layer."""
    layout, active = done.made.layout, done.trace.active(layer)
    present = layout.valid & ~layout.image_tokens
    for row in range(len(present)):
        present[row, layout.slots[row][active[row]]] = True
    return present


def _places(done: Run, layer: int, row: int) -> list[int]:
    """The sequence positions that a layer is given of one row, in order, fillers left out."""
    whole = torch.equal(done.trace.active(layer), done.trace.exists)
    renumbered = any(step.layer <= layer and step.positions == "renumber" for step in done.log.steps)
    if whole and not renumbered:
        return list(range(done.made.length))
    return list(_present(done, layer)[row].nonzero().flatten().tolist())
