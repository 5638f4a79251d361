"""Our own calls from several threads: they take turns on one model, and each gives what it gives alone."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import FakeData, FakeModel, Front, Tour, Whole
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from meetings import PATIENCE, elsewhere, is_free, left_on, side_by_side, started, stopping, until_waiting
from pixellm_checkpoints import write_pixellm

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes
from tokenprune.engine import model_turn, prune
from tokenprune.errors import BusyError, OptionError, UnsupportedError
from tokenprune.evaluation.comparison.timing import interleaved_medians
from tokenprune.testing.tiny_decoders import tiny_llama

IMAGES = [np.random.default_rng(seed).integers(0, 256, (30, 36, 3), dtype=np.uint8) for seed in range(4)]
QUERIES = ["red thing", "the thing left of the star", "a ring"]
FRONT = Front(keep=0.3)
STRATEGIES: list[Any] = [None, FRONT, None, Tour(), Whole(), None]
WRITERS = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


def outcome(result: Any) -> tuple[Any, ...]:
    """Everything about a result, to compare by `==`: masks bit by bit, and what was pruned."""
    trace = result.trace
    entries = None if trace is None else [(e.layer, e.image) for e in trace.ledger.entries]
    logits = getattr(result, "mask_logits", result.masks)
    return result.masks.tolist(), logits.tolist(), entries


def calls(count: int, model: Any, strategies: list[Any], **options: Any) -> list[Any]:
    """Calls of `segment`, all different from their neighbours."""
    return [
        partial(model.segment, IMAGES[n % 4], QUERIES[n % 3], strategies[n % len(strategies)], **options)
        for n in range(count)
    ]


def raw(model: Any, strategy: Any = FRONT, **options: Any) -> Any:
    """A context of the user's own on the decoder."""
    image = torch.zeros(1, 40, dtype=torch.bool)
    image[:, :36] = True
    return prune(model.decoder, strategy, image_tokens=image, **options)


def forward(model: Any) -> Any:
    """A raw call that fits `raw`."""
    with torch.no_grad():
        return model.decoder(torch.arange(40)[None] % 64, use_cache=False).logits


# many calls ----------------------------------------------------------------------------------------------------------


def test_two_hundred_calls_in_eight_threads(model: FakeModel) -> None:
    runs = calls(200, model, STRATEGIES)
    alone = [outcome(run()) for run in runs]
    assert alone[0] != alone[6 + 1]  # strategies do change something
    before = left_on(model)
    together = [outcome(result) for result in side_by_side(runs)]
    assert together == alone
    assert is_free(model.decoder)
    assert left_on(model) == before


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_the_families_calls_and_steps_in_eight_threads(tmp_path: Path, family: str) -> None:
    loaded = tp.load(WRITERS[family](tmp_path / family))
    strategies = [None, tp.strategy("fastv", budget=0.6), tp.strategy("prumerge+", budget=0.6), tp.strategy("csp")]
    strategies.append(tp.strategy("sparsevlm", budget=0.7))  # which has a layer compute ahead
    encoded = loaded.encode_image(IMAGES[0])
    inputs = loaded.build_inputs(encoded, QUERIES[:2])

    def decoded(strategy: Any) -> tuple[Any, Any]:
        states, trace = loaded.run_decoder(inputs, strategy)
        return states.tolist(), None if trace is None else trace.ledger.equivalent_tokens

    runs = [lambda run=run: outcome(run()) for run in calls(15, loaded, strategies)]
    runs += [
        lambda run=run: outcome(run()) for run in calls(5, loaded, strategies, answer="generate", max_new_tokens=4)
    ]
    with torch.no_grad():
        alone = [run() for run in runs]
        steps = [decoded(strategy) for strategy in strategies]
        embeddings = loaded.build_inputs(IMAGES[1], QUERIES).sequence.inputs_embeds

    def stepwise(strategy: Any) -> Any:
        with torch.no_grad():
            return decoded(strategy)

    def built() -> bool:
        with torch.no_grad():
            return torch.equal(loaded.build_inputs(IMAGES[1], QUERIES).sequence.inputs_embeds, embeddings)

    mixed = [*runs, *(partial(stepwise, strategy) for strategy in strategies * 2), built, built]
    assert side_by_side(mixed) == [*alone, *steps * 2, True, True]
    assert is_free(loaded.decoder)


@pytest.mark.slow
def test_two_hundred_calls_of_lisa_tiny() -> None:
    loaded = tp.load("lisa-tiny")
    names = ["csp", "fastv", "prumerge+", "sparsevlm", "visionzip", "uniform"]
    strategies = [None, *(tp.strategy(name, budget=0.35) for name in names)]
    scenes = list(Shapes().scenes("test", limit=12, seed=3))
    runs = [
        partial(
            loaded.segment,
            scenes[n % len(scenes)].image,
            scenes[n % len(scenes)].queries[0].text,
            strategies[n % len(strategies)],
            answer="generate" if n % 5 == 4 else "forced",
            draft=False,  # what was learnt from earlier answers changes rounding
        )
        for n in range(200)
    ]
    alone = [run() for run in runs]
    together = side_by_side(runs)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.mask_logits, other.mask_logits)
        assert (one.trace is None) == (other.trace is None)
    assert is_free(loaded.decoder)


# one beside another --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, FRONT])
def test_a_call_waits_for_one_that_is_under_way(model: FakeModel, first: Any) -> None:
    second = FRONT if first is None else None
    alone = {strategy: outcome(model.segment(IMAGES[0], "red", strategy)) for strategy in (None, FRONT)}
    logits = forward(model)
    with stopping(model.decoder.model.layers[2], "first") as stop:
        one = started(lambda: model.segment(IMAGES[0], "red", first), "first")
        stop.wait()
        other = started(lambda: model.segment(IMAGES[0], "red", second))
        until_waiting(model.decoder)
        assert torch.equal(elsewhere(lambda: forward(model)), logits)  # a raw call waits for nobody
        assert not one.done()
        assert not other.done()
    assert (outcome(one.result(PATIENCE)), outcome(other.result(PATIENCE))) == (alone[first], alone[second])


@pytest.mark.parametrize("threads", ["any", "own"])
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=["untouched", "front"])
def test_a_call_beside_another_threads_context_is_as_without(model: FakeModel, threads: Any, strategy: Any) -> None:
    """Even where the thread that opened the context waits for the call."""
    alone, unpruned = outcome(model.segment(IMAGES[1], "a ring", strategy)), forward(model)
    before = left_on(model)
    with raw(model, Front(keep=0.1), threads=threads) as run:
        pruned = forward(model)
        assert not torch.equal(pruned, unpruned)
        result = elsewhere(lambda: model.segment(IMAGES[1], "a ring", strategy))
        assert outcome(result) == alone
        assert (result.trace is None) == (strategy is None)
        assert torch.equal(forward(model), pruned)
        assert run.trace.ledger.image_tokens == (36,)
        with raw_refused():
            model.segment(IMAGES[1], "a ring", FRONT)  # in this thread it is in the context
    assert torch.equal(forward(model), unpruned)
    assert left_on(model) == before


def raw_refused() -> Any:
    return pytest.raises(UnsupportedError, match="do not nest")


def test_calls_come_in_the_order_of_their_arrival(model: FakeModel) -> None:
    order: list[int] = []

    def turn(number: int) -> None:
        with model_turn(model.decoder):
            order.append(number)

    with model_turn(model.decoder):
        waiting = []
        for number in range(5):
            waiting.append(started(partial(turn, number)))
            until_waiting(model.decoder, number + 1)
    for future in waiting:
        future.result(PATIENCE)
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError("no such thing"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("strategy", [None, FRONT], ids=["untouched", "front"])
def test_an_error_in_the_middle_leaves_the_model_free(model: FakeModel, error: BaseException, strategy: Any) -> None:
    def fail(*args: Any) -> None:
        raise error

    before = left_on(model)
    handle = model.decoder.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        model.segment(IMAGES[0], "red", strategy)
    with pytest.raises(type(error)), raw(model):
        forward(model)
    handle.remove()
    assert is_free(model.decoder)
    assert left_on(model) == before
    assert elsewhere(lambda: model.segment(IMAGES[0], "red", strategy)).masks.any()


# contexts of the user's own ------------------------------------------------------------------------------------------


def opened(model: FakeModel, **options: Any) -> Any:
    """What a raw context gives in the thread that asks."""
    with raw(model, **options):
        return forward(model)


def test_a_context_on_a_busy_model_is_refused_or_waits(model: FakeModel) -> None:
    pruned = opened(model)
    with raw(model, Front(keep=0.1)):
        alone = "MainThread': a pruning .* copied while no context is open"
        for wait, message in ((False, f"is still in use in thread '{alone}"), (0.01, "after 0.01 s")):
            with pytest.raises(BusyError, match=message):
                elsewhere(partial(opened, model, wait=wait))
        patient = [started(partial(opened, model, wait=wait)) for wait in (True, PATIENCE, float("inf"))]
        until_waiting(model.decoder, 3)
        assert not any(future.done() for future in patient)
        assert elsewhere(lambda: model.segment(IMAGES[0], "red")).trace is None  # not kept waiting by those
    for future in patient:
        assert torch.equal(future.result(PATIENCE), pruned)
    assert is_free(model.decoder)


def test_a_context_is_refused_or_waits_while_the_model_segments(model: FakeModel) -> None:
    pruned, alone = opened(model), outcome(model.segment(IMAGES[0], "red", FRONT))
    with stopping(model.decoder.model.layers[2], "first") as stop:
        one = started(lambda: model.segment(IMAGES[0], "red", FRONT), "first")
        stop.wait()
        with pytest.raises(BusyError, match="thread 'first': it is segmenting"):
            opened(model)
        patient = started(partial(opened, model, wait=True))
        until_waiting(model.decoder)
    assert outcome(one.result(PATIENCE)) == alone
    assert torch.equal(patient.result(PATIENCE), pruned)


def test_a_context_of_a_thread_that_has_ended_is_told_at_once(model: FakeModel) -> None:
    pruned = opened(model)
    stack, entered, leave = ExitStack(), threading.Event(), threading.Event()

    def open_and_leave() -> None:
        stack.enter_context(raw(model, Front(keep=0.1)))
        entered.set()
        leave.wait(PATIENCE)

    thread = threading.Thread(target=open_and_leave, name="gone")
    thread.start()
    assert entered.wait(PATIENCE)
    patient = started(partial(opened, model, wait=True))  # since before it ends
    until_waiting(model.decoder)
    leave.set()
    thread.join(PATIENCE)
    with pytest.raises(BusyError, match=r"thread 'gone', which has ended without closing its pruning context; close"):
        patient.result(PATIENCE)
    for wait in (False, True, PATIENCE):
        with pytest.raises(BusyError, match="thread 'gone', which has ended"):
            opened(model, wait=wait)
    assert model.segment(IMAGES[0], "red").trace is None  # turns run beside it
    stack.close()
    assert torch.equal(opened(model), pruned)
    assert is_free(model.decoder)


def test_a_turn_of_a_thread_that_has_ended_is_told_too(model: FakeModel) -> None:
    stack = ExitStack()
    thread = threading.Thread(target=lambda: stack.enter_context(model_turn(model.decoder)), name="gone")
    thread.start()
    thread.join(PATIENCE)
    with pytest.raises(BusyError, match="thread 'gone', which has ended without closing its turn"):
        model.segment(IMAGES[0], "red")
    with pytest.raises(BusyError, match="thread 'gone', which has ended"):
        opened(model, wait=True)
    stack.close()


@pytest.mark.parametrize(
    "options", [{"wait": "long"}, {"wait": -1}, {"wait": float("nan")}, {"wait": None}, {"threads": "all"}], ids=repr
)
def test_other_ways_to_wait_are_refused(model: FakeModel, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}=.* found, expected"):
        opened(model, **options)
    assert is_free(model.decoder)


def test_a_context_closed_by_another_thread(model: FakeModel) -> None:
    before, unpruned = left_on(model), forward(model)
    context = raw(model)
    context.__enter__()
    assert not torch.equal(forward(model), unpruned)
    elsewhere(lambda: context.__exit__(None, None, None))
    assert is_free(model.decoder)
    assert left_on(model) == before
    assert torch.equal(elsewhere(partial(opened, model)), opened(model))


def test_a_context_whose_thread_has_ended_belongs_to_no_later_thread(model: FakeModel) -> None:
    context = raw(model, threads="own")
    elsewhere(context.__enter__)
    unpruned = outcome(model.segment(IMAGES[0], "red"))
    for _ in range(20):  # numbers of threads are given anew
        assert outcome(elsewhere(lambda: model.segment(IMAGES[0], "red"))) == unpruned
    with pytest.raises(BusyError):
        elsewhere(partial(opened, model))
    context.__exit__(None, None, None)
    assert is_free(model.decoder)


def test_a_second_coroutine_of_the_thread_is_refused_rather_than_hung(model: FakeModel) -> None:
    async def both() -> None:
        inside, done = asyncio.Event(), asyncio.Event()

        async def one() -> None:
            with raw(model):
                inside.set()
                await done.wait()

        task = asyncio.create_task(one())
        await inside.wait()
        with raw_refused(), raw(model, wait=True):
            pass
        assert (await asyncio.to_thread(model.segment, IMAGES[0], "red")).trace is None
        done.set()
        await task

    asyncio.run(both())
    assert is_free(model.decoder)


# compare -------------------------------------------------------------------------------------------------------------


class Plain(FakeModel):
    """An adapter's model that sees to nothing: its contexts do not wait."""

    def run_decoder(self, inputs: Any, strategy: Any = None) -> Any:
        """Without a turn."""
        if strategy is None:
            return self.decoder.model(inputs_embeds=inputs.embeds, attention_mask=inputs.attention_mask)[0], None
        marks = {"mask_query": inputs.mask_query}
        with prune(self.decoder, strategy, image_tokens=inputs.image_tokens, queries=marks) as run:
            states = self.decoder.model(inputs_embeds=inputs.embeds, attention_mask=inputs.attention_mask)[0]
        return states, run.trace


def test_comparisons_in_several_threads() -> None:
    model = Plain()
    compare = partial(tp.compare, model, FakeData(), [Front(), Tour()], 0.6, limit=6, timing_samples=1, timing_rounds=1)

    def figures() -> list[Any]:
        return [(row.label, row.giou, row.equivalent_tokens, row.flops) for row in compare().rows]

    alone = figures()
    assert side_by_side([figures] * 4, threads=4) == [alone] * 4
    assert is_free(model.decoder)


def test_what_a_run_waits_for_is_not_timed() -> None:
    now = 0.0

    class Waiting:
        def __enter__(self) -> None:
            nonlocal now
            now += 1000

        def __exit__(self, *error: object) -> None:
            pass

    def run() -> None:
        nonlocal now
        now += 3

    assert interleaved_medians([[run, run]] * 2, rounds=2, clock=lambda: now, alone=Waiting) == [3, 3]


def test_compare_has_the_model_to_itself_while_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = FakeModel(), []

    def clock() -> float:
        with pytest.raises(BusyError):
            elsewhere(partial(opened, model))
        seen.append(threading.current_thread())
        return 0.0

    monkeypatch.setitem(interleaved_medians.__kwdefaults__, "clock", clock)
    tp.compare(model, FakeData(), [Front()], limit=2, timing_samples=1, timing_rounds=2)
    assert len(seen) == 2 * 2 * 2
    assert is_free(model.decoder)


def test_the_model_of_a_turn_is_the_one_that_is_pruned() -> None:
    llama = tiny_llama(2)
    image = torch.ones(1, 4, dtype=torch.bool)
    with model_turn(llama), pytest.raises(BusyError):
        elsewhere(lambda: prune(llama.model, Whole(), image_tokens=image).__enter__())
