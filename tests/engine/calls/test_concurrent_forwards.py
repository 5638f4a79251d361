"""Forwards of several threads on one model, with a raw pruning context: none is ever mixed into another's."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meetings import PATIENCE, Stop, elsewhere, is_free, left_on, side_by_side, started, stopping
from transformers import DynamicCache, TextIteratorStreamer
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT, FAMILIES, NAMES

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom, ClsAttention, Crops, ReceivedAttention, TowerFeatures
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.checked_model import bound_model_of
from tokenprune.engine.interface.turns import decoder_in
from tokenprune.engine.reads.attention_tap import tap
from tokenprune.errors import UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS = 4
IDS = torch.arange(48).reshape(2, 24)
OTHER = IDS.flip(1)
IMAGE = torch.zeros(2, 24, dtype=torch.bool)
IMAGE[:, 3:19] = True


class Best(Strategy):
    """Keeps half of the tokens by attention, before layer 2; `meet` is called while it chooses."""

    name = "best"
    meet: Any = None

    def __init__(self, layer: str = "before") -> None:
        super().__init__()
        self._read = AttentionFrom("last", layer=layer)  # type: ignore[arg-type]

    def stages(self, shape: Any) -> Any:
        """One."""
        return [Stage("only", 2, reads=self._read)]

    def choose(self, stage: Any, tokens: Any) -> Any:
        """By attention."""
        if self.meet is not None:
            self.meet()
        return Keep.top(tokens.attention, tokens.count(0.5))


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_llama(LAYERS, attention=request.param)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def pruned(model: Any, ids: torch.Tensor = IDS, layer: str = "before") -> torch.Tensor:
    """What the engine gives without threads; the oracle holds it to the definition elsewhere."""
    with prune(model, Best(layer), image_tokens=IMAGE):
        return logits(model, ids)


@pytest.mark.parametrize("layer", ["before", "next"])
@pytest.mark.parametrize("where", range(LAYERS))
def test_a_forward_from_before_the_context_runs_on_unpruned(model: Any, where: int, layer: str) -> None:
    """It stands anywhere when the context opens, and passes tapped layers while the prefill waits for it."""
    alone, expected, before = logits(model, OTHER), pruned(model, layer=layer), left_on(model)
    strategy = Best(layer)
    with stopping(model.model.layers[where], "early") as stop:
        early = started(lambda: logits(model, OTHER), "early")
        stop.wait()
        with prune(model, strategy, image_tokens=IMAGE):

            def meet() -> None:
                stop.go.set()
                assert torch.equal(early.result(PATIENCE), alone)

            strategy.meet = meet
            assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(model))
    handles = left_on(model)
    assert handles == before


@pytest.mark.parametrize("part", ["v_proj", "o_proj", "q_proj", "k_proj"])
def test_a_forward_beside_a_layer_that_computes_ahead(model: Any, part: str) -> None:
    """There the layer's projections are given nothing to do, but for the thread that asks alone."""
    alone, expected = logits(model, OTHER), pruned(model, layer="next")
    with stopping(getattr(model.model.layers[2].self_attn, part), "MainThread") as stop:

        def beside() -> torch.Tensor:
            stop.wait()
            try:
                return logits(model, OTHER)
            finally:
                stop.go.set()

        other = started(beside)
        with prune(model, Best("next"), image_tokens=IMAGE, threads="own"):
            assert torch.equal(logits(model), expected)
        assert torch.equal(other.result(PATIENCE), alone)


def test_forwards_of_all_threads_are_pruned_one_at_a_time(model: Any) -> None:
    expected = {ids: pruned(model, ids) for ids in (IDS, OTHER)}
    with prune(model, Best(), image_tokens=IMAGE):
        with stopping(model.model.layers[1], "first") as stop:
            first = started(lambda: logits(model), "first")
            stop.wait()
            second = started(lambda: logits(model, OTHER))
        assert torch.equal(first.result(PATIENCE), expected[IDS])
        assert torch.equal(second.result(PATIENCE), expected[OTHER])
        many = side_by_side([partial(logits, model, ids) for ids in (IDS, OTHER) * 20])
    assert all(torch.equal(found, expected[ids]) for found, ids in zip(many, (IDS, OTHER) * 20, strict=True))


def test_only_the_own_threads_forwards_are_pruned(model: Any) -> None:
    alone, expected = logits(model, OTHER), pruned(model)
    strategy = Best()
    with prune(model, strategy, image_tokens=IMAGE, threads="own"):
        strategy.meet = lambda: results.append(elsewhere(lambda: logits(model, OTHER)))
        results: list[torch.Tensor] = []
        assert torch.equal(logits(model), expected)
    assert torch.equal(results[0], alone)


def test_closing_waits_for_the_forward_of_another_thread(model: Any) -> None:
    expected, before, unpruned = pruned(model, OTHER), left_on(model), logits(model)
    stop = Stop()
    strategy = Best()
    strategy.meet = stop
    context = prune(model, strategy, image_tokens=IMAGE)
    context.__enter__()
    other = started(lambda: logits(model, OTHER))
    stop.wait()
    closed = started(lambda: context.__exit__(None, None, None))
    assert not closed.done()
    stop.go.set()
    closed.result(PATIENCE)
    assert torch.equal(other.result(PATIENCE), expected)
    assert left_on(model) == before
    assert is_free(model)
    assert torch.equal(logits(model), unpruned)


@pytest.mark.parametrize("error", [ValueError("no such thing"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_one_threads_forward_leaves_the_others_theirs(model: Any, error: BaseException) -> None:
    expected = pruned(model)
    strategy = Best()
    with prune(model, strategy, image_tokens=IMAGE):

        def meet() -> None:
            if threading.current_thread().name == "failing":
                raise error

        strategy.meet = meet
        with pytest.raises((tp.TokenPruneError, KeyboardInterrupt)):
            elsewhere(lambda: logits(model, OTHER), "failing")
        assert torch.equal(logits(model), expected)
        assert torch.equal(elsewhere(lambda: logits(model)), expected)
    assert is_free(model)


# generation ----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer for the streamer: a word for each id."""

    def decode(self, ids: Any, **options: Any) -> str:
        """Ids as words."""
        return "".join(f"{int(token)} " for token in ids)


OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_streaming_from_a_worker_thread() -> None:
    model = tiny_llama(LAYERS)
    inputs = {"inputs_embeds": model.get_input_embeddings()(IDS[:1]), "attention_mask": torch.ones_like(IDS[:1])}
    with torch.no_grad(), prune(model, Best(), image_tokens=IMAGE[:1]):
        expected = model.generate(**inputs, **OPTIONS)[0].tolist()
    plain = model.generate(**inputs, **OPTIONS)[0].tolist()
    streamer = TextIteratorStreamer(Words(), timeout=PATIENCE)  # type: ignore[arg-type]
    with prune(model, Best(), image_tokens=IMAGE[:1]) as run:
        worker = started(lambda: model.generate(**inputs, **OPTIONS, streamer=streamer))
        said = [int(word) for word in "".join(streamer).split()]
        assert worker.result(PATIENCE)[0].tolist() == expected
        assert run.trace.ledger.image_tokens == (16,)
    assert said == expected
    assert said != plain


def test_what_a_worker_goes_on_with_after_the_context_is_refused() -> None:
    model = tiny_llama(LAYERS)
    stop = Stop()

    def work() -> None:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            stop()
            model(IDS[:, :1], past_key_values=cache)

    with prune(model, Best(), image_tokens=IMAGE):
        worker = started(work)
        stop.wait()
    stop.go.set()
    with pytest.raises(UnsupportedError, match="context is closed; continue generating inside"):
        worker.result(PATIENCE)


# vision-language models ----------------------------------------------------------------------------------------------


@cache
def family(name: str) -> Any:
    return FAMILIES[name].build()


def conversation(model: Any, inputs: dict[str, Any], meet: Any = lambda: None) -> list[torch.Tensor]:
    """Logits of a prefill and of three steps on its cache."""
    found, cache, ids = [], None, inputs
    with torch.no_grad():
        for _ in range(4):
            output = model(**ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[:, -1])
            meet()
            ids = {"input_ids": output.logits[:, -1:].argmax(-1)}
    return found


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen3_vl", "idefics3", "gemma3"])
def test_two_conversations_in_two_threads_of_one_context(name: str) -> None:
    """They go step by step, one after the other; then as they please."""
    model = family(name)
    both = [FAMILIES[name].inputs([size], seed=seed, texts=[(4, 6)]) for seed, size in enumerate([(24, 32), (40, 20)])]
    strategy = partial(tp.strategy, "fastv", layer=1, keep=0.4)
    alone = []
    for inputs in both:
        with tp.prune(model, strategy()):
            alone.append(conversation(model, inputs))
    unpruned = conversation(model, both[0])
    assert not torch.equal(alone[0][0], unpruned[0])
    barrier = threading.Barrier(2, timeout=PATIENCE)
    with tp.prune(model, strategy()):
        together = side_by_side([partial(conversation, model, inputs, barrier.wait) for inputs in both], threads=2)
        together += side_by_side([partial(conversation, model, inputs) for inputs in both * 3], threads=4)
    for found, expected in zip(together, alone * 4, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("strategy", [None, "fastv"])
def test_generation_in_several_threads(name: str, strategy: str | None) -> None:
    """Qwen-VL's own state of the latest conversation is every conversation's own; unpruned in turns, pruned in one."""
    model = family(name)
    prompts = [FAMILIES[name].inputs([size], seed=seed) for seed, size in enumerate([(24, 32), (40, 20), (36, 36)])]
    context = tp.prune(model, tp.strategy(strategy or "none", **({"layer": 1, "keep": 0.4} if strategy else {})))

    def said(inputs: dict[str, Any]) -> list[int]:
        found: list[int] = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
        return found

    with tp.prune(model, tp.strategy(strategy, layer=1, keep=0.4)) if strategy else nullcontext():
        alone = [said(inputs) for inputs in prompts]
    with context:
        assert side_by_side([partial(said, inputs) for inputs in prompts * 4], threads=3) == alone * 4


@pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
@pytest.mark.parametrize("strategy", [None, tp.strategy("fastv", layer=1, keep=0.4)], ids=["untouched", "fastv"])
def test_an_answer_in_the_middle_of_another_threads_conversation(tmp_path: Path, strategy: Any) -> None:
    loaded = tp.load(write_vlm(tmp_path / "qwen2_vl", "qwen2_vl"))
    picture = np.random.default_rng(0).integers(0, 256, (112, 28, 3), dtype=np.uint8)
    answer = partial(loaded.answer, picture, "What is it?", strategy, 6)
    alone = answer().text
    inputs = FAMILIES["qwen2_vl"].inputs([(24, 32)])
    with tp.prune(loaded.model, tp.strategy("fastv", layer=1, keep=0.4)):
        expected = conversation(loaded.model, inputs)
        answers: list[str] = []
        found = conversation(loaded.model, inputs, lambda: answers.append(elsewhere(answer).text))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert answers == [alone] * 4


class Reader(Strategy):
    """Keeps the tokens by what it reads of the tower."""

    name = "tower reader"

    def __init__(self, *reads: Any) -> None:
        super().__init__()
        self._reads = reads
        self.seen: list[torch.Tensor] = []

    def stages(self, shape: Any) -> Any:
        """One, before the first layer."""
        return [Stage("only", 0, reads=self._reads)]

    def choose(self, stage: Any, tokens: Any) -> Any:
        """The first read's largest."""
        self.seen = [getattr(tokens, read.field).float().clone() for read in self._reads]
        score = self.seen[0]
        return Keep.top(score if score.dim() == 2 else score.norm(dim=-1), tokens.count(0.5))


READS = {
    "llava": (TowerFeatures(), ClsAttention(0), Crops()),
    "llava_next": (TowerFeatures(), ReceivedAttention(0)),
    "qwen2_vl": (TowerFeatures(), ReceivedAttention(0)),
}


@pytest.mark.parametrize("name", sorted(READS))
@pytest.mark.parametrize("threads", ["any", "own"])
def test_the_towers_are_not_mixed(name: str, threads: Any) -> None:
    """Another thread's forward began before, stands in the tower meanwhile, and goes on while this one's is read."""
    model = family(name)
    mine, other = (FAMILIES[name].inputs([size], seed=9) for size in [(24, 32), (40, 20)])
    binding = bound_model_of(model)._inner  # type: ignore[attr-defined]
    projector = binding.projector

    def run(inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    alone, reader = run(other), Reader(*READS[name])
    with tp.prune(model, reader):
        expected, seen = run(mine), reader.seen
    with stopping(binding.blocks["image"][0], "early") as early, stopping(projector, "MainThread") as inside:
        outside = started(lambda: run(other), "early")
        early.wait()

        def beside() -> torch.Tensor:
            inside.wait()  # the main thread is in the middle of its tower, with all taps and hooks on
            early.go.set()
            try:
                return outside.result(PATIENCE)
            finally:
                inside.go.set()

        helper = started(beside)
        with tp.prune(model, reader, threads=threads):
            assert torch.equal(run(mine), expected)
        assert torch.equal(helper.result(PATIENCE), alone)
    assert all(torch.equal(one, two) for one, two in zip(reader.seen, seen, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_turns_and_contexts_find_the_same_decoder(name: str) -> None:
    model = family(name)
    decoder = find_decoder(bound_model_of(model).decoder).module
    assert decoder_in(model) is decoder
    assert decoder_in(decoder) is decoder


@pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_answers_in_eight_threads(tmp_path: Path, name: str) -> None:
    model = tp.load(write_vlm(tmp_path / name, name))
    pictures = [np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8) for seed in range(3)]
    strategies = [None, tp.strategy("fastv", layer=1, keep=0.4), tp.strategy("random", budget=0.5)]

    def ask(n: int) -> Any:
        answer = model.answer(pictures[n % 3], ("What?", "And why is it so?")[n % 2], strategies[n // 2 % 3], 4)
        return answer.text, None if answer.trace is None else answer.trace.ledger.equivalent_tokens

    runs = [partial(ask, n) for n in range(18)]
    alone = [run() for run in runs]
    assert side_by_side(runs) == alone
    with tp.prune(model.model, tp.strategy("blind")):
        assert elsewhere(runs[0]) == alone[0]
        assert elsewhere(runs[2]) == alone[2]


# the parts -----------------------------------------------------------------------------------------------------------


def test_looks_may_stop_in_any_order() -> None:
    class Thing:
        def word(self) -> str:
            return "word"

    def look(mark: str, original: Any) -> str:
        return f"{mark}({original()})"

    thing = Thing()
    first, second = (shadowed(thing, "word", partial(look, mark), every_thread=True) for mark in "ab")
    first.__enter__()
    second.__enter__()
    assert thing.word() == "b(a(word))"
    first.__exit__(None, None, None)
    assert thing.word() == "b(word)"
    second.__exit__(None, None, None)
    assert thing.word() == "word"
    assert vars(thing) == {}
    with shadowed(thing, "word", partial(look, "c")):
        assert (thing.word(), elsewhere(thing.word)) == ("c(word)", "word")


def test_taps_of_several_threads_on_one_module(model: Any) -> None:
    module, before = model.model.layers[0].self_attn, model.model.layers[0].self_attn.config
    seen: dict[str, list[Any]] = {"mine": [], "other": []}
    mine, other = tap({module: seen["mine"].append}), tap({module: seen["other"].append})
    worker = started(lambda: None)
    worker.result(PATIENCE)
    go, tapped, done = Stop(), threading.Event(), threading.Event()

    def beside() -> None:
        with other:
            tapped.set()
            go()
            logits(model, OTHER)
        done.set()

    mine.__enter__()
    future = started(beside)
    assert tapped.wait(PATIENCE)
    logits(model)
    mine.__exit__(None, None, None)
    assert module.config is not before  # the other's is still on
    go.go.set()
    future.result(PATIENCE)
    assert done.is_set()
    assert module.config is before
    assert [len(found) for found in seen.values()] == [1, 1]
    assert not torch.equal(seen["mine"][0].query, seen["other"][0].query)
