"""How often the host waits for the device: for values of tensors, which on a GPU stops the queue of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host_waits import Waits
from oracle_cases import CACHES, empty_cache
from pretend_devices import PretendDevices, Pretender, pretend
from torch import Tensor
from torch.utils._pytree import tree_map_only

import tokenprune as tp
from tokenprune.core.trace import Trace
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.testing.kit.cases import Row, SyntheticBatch
from tokenprune.testing.kit.synthetic_vision import synthetic_vision_of
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune.utils.host_copies import on_host

WIDTH, DEVICE = 32, torch.device("cuda:0")
OURS = ("tokenprune/", "strategies/")
LARGE, SMALL = Row(((6, 6), (3, 4)), before=3, after=5), Row(((4, 4),), before=2, after=4, seed=1)
BATCHES = {
    "equal rows": SyntheticBatch((LARGE, Row(LARGE.images, 3, 5, seed=2)), "right"),
    "padded left": SyntheticBatch((SMALL, LARGE, SMALL), "left"),
}
# Tokens and padding come in one copy. Some strategies ask for more, once: whether positions begin at 0, which
# crops the tokens are of, the scores of blocks, similar patches, how many texts or merged tokens there are.
CONSTANT = {
    "dart": 2,
    "holov": 3,
    "ivcprune": 2,
    "prunesid": 3,
    "knorm": 2,
    "tome": 3,
    "visionzip": 2,
    "vispruner": 2,
    "fastervlm": 2,
    "cdpruner": 2,
    "litelvlm": 3,
    "vscan": 2,
    "vitcop": 4,
}
NAMES = ["blind", "uniform", "random", "fastv", "divprune", "similarity", "pyramiddrop", "csp", "prumerge", "prumerge+"]
NAMES += ["sparsevlm", "sparsevlm+", "feather", "nuwa", *CONSTANT]


@pytest.fixture(autouse=True)
def pretending() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("pretended CUDA devices would get in the way of the real ones of this machine")
    with PretendDevices():
        yield


def on_device(value: Any) -> Any:
    return tree_map_only(Tensor, lambda one: one if isinstance(one, Pretender) else Pretender(one, DEVICE), value)


def vision_on_device(made: SyntheticBatch) -> VisionSource:
    """The synthetic reads, ready on the device as those of a tower are."""
    source = synthetic_vision_of(made, WIDTH)

    def ready(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda read: moved(answer(read))

    def moved(value: Any) -> Any:
        if callable(value):  # the projector
            return lambda states: on_device(value(states.held))
        return on_device(value)

    return VisionSource({kind: ready(answer) for kind, answer in source.answers.items()}, source.layers)


def waits_of_a_prefill(strategy: tp.Strategy, made: SyntheticBatch, marks: Tensor, layers: int) -> tuple[Waits, Trace]:
    model = tiny_llama(layers, attention="eager")
    pretend(model, str(DEVICE))
    embeds, mask = on_device(made.embeds(WIDTH)), None if made.mask is None else on_device(made.mask)
    given = {"grid": made.grid, "image_number": made.number, "vision": vision_on_device(made)}
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks, **given) as run:
        with Waits() as waits:
            model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return waits, run.trace


def test_the_counter_counts() -> None:
    values, numbers = torch.tensor([1.0, 0.0]).to(DEVICE), torch.tensor([0])
    with Waits() as waits:
        bool(values[0] > 0), values.nonzero(), values[values > 0], torch.equal(values, values), values.tolist()
        numbers.to(DEVICE), on_host(values, values)
        assert waits.found.total() == 7
        values + 1, values[numbers.to(DEVICE, non_blocking=True)], values.clone(), numbers.nonzero(), numbers.tolist()
    assert waits.found.total() == 7


def test_tensors_of_all_kinds_come_in_one_copy() -> None:
    given = [
        torch.tensor([[True, False]]),
        torch.arange(6).reshape(2, 3).T,
        torch.randn(3),
        torch.zeros(2, 0),
        torch.ones(()),
    ]
    with Waits() as waits:
        found = on_host(*map(on_device, given), given[2])
    assert waits.found.total() == 1
    for one, other in zip(found, [*given, given[2]], strict=True):
        assert not isinstance(one, Pretender)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize(("batch", "budget"), [("equal rows", 0.6), ("padded left", 0.3)])
@pytest.mark.parametrize("name", NAMES)
def test_a_prefill_waits_at_most_once_for_each_stage_that_chooses(name: str, budget: float, batch: str) -> None:
    made = BATCHES[batch]
    strategy = tp.strategy(name, **({} if name == "blind" else {"budget": budget}))
    waits, trace = waits_of_a_prefill(strategy, made, made.layout.image_tokens, layers=8)
    assert trace.stages
    assert waits.of(*OURS) <= len(trace.stages) + CONSTANT.get(name, 1), f"{len(trace.stages)} stages, waits:\n{waits}"


def test_a_part_of_a_composition_waits_for_the_checks_of_its_decision_too() -> None:
    made = BATCHES["padded left"]
    strategy = tp.Sequence("divprune", tp.strategy("fastv", layer=3))
    waits, trace = waits_of_a_prefill(strategy, made, made.layout.image_tokens, layers=6)
    assert len(trace.stages) == 2
    assert waits.of(*OURS) <= 2 * len(trace.stages) + 1, f"waits:\n{waits}"


def test_marks_on_the_device_come_with_the_mask() -> None:
    made = BATCHES["padded left"]
    waits, _ = waits_of_a_prefill(tp.strategy("fastv"), made, on_device(made.layout.image_tokens), layers=4)
    # grid and image numbers are the caller's, on the host; marks, mask and the prompt's fingerprint come in one copy
    assert waits.of(*OURS) <= 2, f"waits:\n{waits}"


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("masked", [False, True], ids=["without mask", "with mask"])
@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramiddrop", "divprune"])
def test_a_decoding_step_waits_at_most_once(name: str, masked: bool, kind: str) -> None:
    made = BATCHES["equal rows"]
    model, token, prompt = tiny_llama(12), torch.ones(2, 1, dtype=torch.long), made.length

    def mask(length: int) -> Tensor | None:
        return torch.ones(2, length, dtype=torch.long) if masked else None

    strategy, marks = tp.strategy(name, budget=0.5), made.layout.image_tokens
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks) as run:
        given = {"inputs_embeds": made.embeds(WIDTH), "attention_mask": mask(prompt)}
        cache = empty_cache(kind, model, prompt + 4)
        model(**given, past_key_values=cache)
        model(input_ids=token, attention_mask=mask(prompt + 1), past_key_values=cache)
        with Waits(anywhere=True) as waits:  # a cache makes its tensors on no device that can be pretended
            model(input_ids=token, attention_mask=mask(prompt + 2), past_key_values=cache)
        assert run.trace.stages
    assert waits.found.total() <= int(masked), (
        f"waits:\n{waits}"
    )  # transformers looks into the mask, once for all layers
