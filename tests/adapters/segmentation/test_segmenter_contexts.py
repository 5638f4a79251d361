"""One pruning context around many calls of a segmentation model, which is its own bound model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from pixellm_checkpoints import write_pixellm

import tokenprune as tp
from tokenprune.engine import decoder as decoders
from tokenprune.engine import model_turn
from tokenprune.engine.interface import compatibility
from tokenprune.errors import IncompatibleError, InputError, UnsupportedError

WRITERS: dict[str, Callable[[Path], Path]] = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}
IMAGES = [np.random.default_rng(seed).integers(0, 256, (40 + seed, 60, 3), dtype=np.uint8) for seed in range(2)]
QUERIES = ["the cat", "the thing behind the red car"]


@pytest.fixture(scope="module", params=sorted(WRITERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tp.load(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("name", ["csp", "fastv", "prumerge+", "sparsevlm"])
def test_calls_in_a_context_are_those_with_the_strategy(model: Any, name: str) -> None:
    strategy = tp.strategy(name, budget=0.7)
    ways: list[dict[str, Any]] = [{}, {"answer": "generate", "max_new_tokens": 3}]
    calls = [(image, query, way) for image in IMAGES for query in (QUERIES, QUERIES[1]) for way in ways]
    expected = [model.segment(image, query, strategy, **way) for image, query, way in calls]
    with tp.prune(model, strategy) as run:
        for (image, query, way), alone in zip(calls, expected, strict=True):
            found = model.segment(image, query, **way)
            assert torch.equal(found.mask_logits, alone.mask_logits)
            assert found.text == alone.text
            assert found.trace is run.trace
            assert found.trace.ledger == alone.trace.ledger
    assert model.segment(IMAGES[0], QUERIES).trace is None


def test_query_rows_of_the_caller_are_added(model: Any) -> None:
    inputs = model.build_inputs(IMAGES[0], QUERIES)
    places = inputs.sequence.attention_mask.bool() & ~inputs.sequence.image_tokens
    mine = torch.zeros_like(places)
    mine[torch.arange(len(mine)), places.int().argmax(1)] = True  # the first text token
    with torch.no_grad(), tp.prune(model, tp.strategy("none"), queries={"mine": mine}) as run:
        model.run_decoder(inputs)
    assert {*run.layout.queries} >= {"mine", "mask_query"}
    assert torch.equal(run.layout.queries["mine"], mine)
    assert torch.equal(run.layout.queries["mask_query"], inputs.sequence.mask_query)


def test_the_decoder_itself_is_refused(model: Any) -> None:
    ids = torch.arange(1, 9)[None]
    with tp.prune(model, tp.strategy("fastv", budget=0.7)):
        with pytest.raises(InputError, match=r"decoder was called directly.*call segment"):
            model.decoder(input_ids=ids)
        assert model.segment(IMAGES[0], "the cat").trace is not None  # nothing is left of it
    model.decoder(input_ids=ids)


def test_another_model_is_not_taken_for_this_one(model: Any) -> None:
    other = copy.deepcopy(model)
    with tp.prune(model, tp.strategy("fastv", budget=0.7)):
        assert other.segment(IMAGES[0], "the cat").trace is None
        assert model.segment(IMAGES[0], "the cat").trace is not None


def test_what_lengthens_the_prompt_is_refused(model: Any) -> None:
    def lengthened(module: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        grown = torch.cat((embeds[:, :1], embeds), 1)
        return args, {"inputs_embeds": grown, "use_cache": False}

    hook = model.decoder.model.register_forward_pre_hook(lengthened, with_kwargs=True)
    try:
        with pytest.raises(InputError, match=r"layers received \[1, \d+\] positions for a prompt of \[1, \d+\]"):
            model.segment(IMAGES[0], "the cat", tp.strategy("fastv", budget=0.7))
    finally:
        hook.remove()


def test_other_threads_run_beside_it(model: Any) -> None:
    plain = model.segment(IMAGES[1], "the cat").mask_logits
    found: list[Any] = []
    with tp.prune(model, tp.strategy("fastv", budget=0.7)):
        thread = threading.Thread(target=lambda: found.append(model.segment(IMAGES[1], "the cat")))
        thread.start()
        thread.join()
    assert found[0].trace is None
    assert torch.equal(found[0].mask_logits, plain)


def test_contexts_do_not_nest(model: Any) -> None:
    strategy = tp.strategy("fastv", budget=0.7)
    with tp.prune(model, strategy):
        for way in (lambda: tp.prune(model, strategy).__enter__(), lambda: model.segment(IMAGES[0], "x", strategy)):
            with pytest.raises(UnsupportedError, match="do not nest"):
                way()
    with model_turn(model), tp.prune(model, strategy):  # a turn of the model is one of its decoder
        assert model.segment(IMAGES[0], "the cat").trace is not None


def test_an_incompatible_strategy_is_refused_when_the_context_opens(model: Any) -> None:
    strategy = tp.strategy("cdpruner")
    reason = tp.compatible(strategy, model).reason
    assert reason
    with pytest.raises(IncompatibleError) as refusal, tp.prune(model, strategy):
        pytest.fail("the context was opened")
    assert str(refusal.value) == reason


@pytest.mark.parametrize("answer", ["forced", "generate"])
def test_a_call_asks_once(model: Any, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Whether the strategy is compatible, and where the decoder is."""
    strategy = tp.strategy("fastv", budget=0.7)
    model.segment(IMAGES[0], "the cat", strategy)
    asked = {"check_fit": 0, "modules_of": 0}

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            asked[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    counted(compatibility, "check_fit")
    counted(decoders, "modules_of")  # what `find_decoder` walks
    model.segment(IMAGES[0], "the cat", strategy, answer=answer, max_new_tokens=2)
    assert asked == {"check_fit": 1, "modules_of": 1}
