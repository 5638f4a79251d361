"""Plugins of every kind that fail where their code runs, or answer with junk: named, and nothing else suffers."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune import Adapter, AttentionFrom, Keep, Merge, Stage, Strategy, StrategyOptions, TowerFeatures
from tokenprune.engine import BoundModel, PromptMasks, VisionCapture
from tokenprune.errors import InputError, PluginError, PluginWarning
from tokenprune.plugins import registry
from tokenprune.testing.kit.model_snapshot import differences, snapshot
from tokenprune.testing.tiny_decoders import tiny_llama

MODEL = tiny_llama(4)
IDS = torch.arange(24).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:8] = True


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    registry.reset()
    before, expected = snapshot(MODEL), run(tp.strategy("fastv"))
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    registry.reset()
    assert differences(before, snapshot(MODEL)) == []
    assert settings == (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    assert torch.equal(run(tp.strategy("fastv")), expected)


def plug(**hooks: Callable[..., Any]) -> None:
    """Register a plugin "mine" with these hooks."""
    registry.register_plugin(type("Mine", (), {f"tokenprune_{k}": tp.hookimpl(f) for k, f in hooks.items()})(), "mine")


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def run(strategy: Any, body: Callable[[], Any] = lambda: None, **marks: Any) -> torch.Tensor:
    with torch.no_grad(), tp.prune(MODEL, strategy, **(marks or {"image_tokens": IMAGE}), strict=True):
        body()
        logits: torch.Tensor = MODEL(IDS).logits
    return logits


# strategies ----------------------------------------------------------------------------------------------------------


class Plain(Strategy):
    name = "bad"
    budget_option = "keep"

    class Options(StrategyOptions):
        keep: float = 0.5

    def stages(self, shape):
        yield Stage("prune", 2, 3, AttentionFrom("last"))

    def choose(self, stage, tokens):
        return Keep.top(tokens.attention, 3)


INDEX = torch.tensor([[0, 1, 2]] * 2)
WEIGHTS = torch.eye(6)[None, :3].expand(2, -1, -1)


class Evil(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message either")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: Keep(INDEX.to_sparse()), "index is a sparse_coo tensor; expected a dense one"),
        (lambda: Keep([[0, 1, 2]] * 2), "index is list; expected a tensor"),
        (lambda: Keep(INDEX, scores=[[0.0] * 6] * 2), "scores is list; expected a tensor"),
        (lambda: Keep(INDEX, scores=torch.zeros(2, 6, device="meta")), "scores is on meta; expected cpu"),
        (lambda: Keep(INDEX, scores=torch.zeros(2, 6, dtype=torch.complex64)), "scores are torch.complex64"),
        (
            lambda: Keep(INDEX, values=torch.full((2, 3, 32), 1e300, dtype=torch.float64)),
            "finite in float32",
        ),
        (lambda: Merge(INDEX, weights=None), "weights is NoneType; expected a tensor"),
        (lambda: Merge(INDEX, weights=WEIGHTS.to(torch.complex64)), "weights are torch.complex64; expected floating"),
        (
            lambda: Merge(INDEX, weights=WEIGHTS.double() * 1e300),
            "infinity among the weights; expected numbers that are finite in float32",
        ),
        (lambda: Merge(INDEX, weights=WEIGHTS.to(torch.float8_e4m3fn)), "the check of the decision's tensors failed"),
        (lambda: Merge(INDEX, weights=WEIGHTS, origin=INDEX + 75), "origin out of range: 75; expected"),
        (
            lambda: Merge(INDEX, weights=WEIGHTS, origin=INDEX.float()),
            "origin is [2, 3] torch.float32",
        ),
        (lambda: sys.exit(3), "raised SystemExit: 3"),
        (raising(Evil()), "raised Evil"),
        (lambda: MODEL(IDS), "the model was called from a strategy, an observer or an adapter"),
        (
            lambda: MODEL.model.layers[3](torch.zeros(2, 12, 32)),
            "the model was called from a strategy, an observer or an adapter",
        ),
        (lambda: torch.set_default_dtype(torch.float64), "choose() changed the default type for the whole process"),
        (lambda: torch.set_grad_enabled(True), "changed whether gradients are recorded"),
    ],
)
def test_what_a_strategy_answers_or_does(answer: Callable[[], Any], message: str) -> None:
    class Bad(Plain):
        def choose(self, stage, tokens):
            return answer() or super().choose(stage, tokens)

    with pytest.raises(PluginError) as told:
        run(Bad())
    assert str(told.value).startswith("strategy 'bad'")
    assert message in str(told.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full"), KeyboardInterrupt()])
def test_memory_that_ran_out_and_interrupts_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run(type("Bad", (Plain,), {"choose": raising(error)})())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"solve_budget": lambda *_: 1 / 0}, "solve_budget() raised ZeroDivisionError"),
        ({"solve_budget": lambda *_: None}, "solve_budget() gave None; expected values by the names of options"),
        ({"bind": lambda *_: None}, "bind() gave None; expected a strategy"),
        ({"__repr__": lambda _: None}, "__repr__() raised TypeError"),
        (
            {"budget_option": ["keep"], "solve_budget": Strategy.solve_budget},
            "budget_option ['keep'] is none of its options",
        ),
        ({"stages": lambda *_: [Stage(None, 2, 3)]}, "found None as the name of a stage"),
        ({"stages": lambda *_: [Stage("a", 2, 3, None)]}, "stage 'a': None among its reads"),
        (
            {"choose": lambda s, a, t: setattr(t, "memory", {})},
            "assigns to tokens.memory; Tokens cannot be assigned to",
        ),
        ({"choose": lambda s, a, t: t.mark("row", t.text.long())}, r"tokens.mark('row') was given [2, 6] torch.int64"),
    ],
)
def test_what_a_strategy_says_of_itself(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError) as told:
        run(type("Bad", (Plain,), {"solve_budget": lambda *_: {}, **parts})(budget=0.8))
    assert str(told.value).startswith("strategy 'bad'")
    assert message in str(told.value)


def test_a_subclass_of_merge_is_a_merge_in_the_trace() -> None:
    class Mine(Merge):
        pass

    strategy = type("Good", (Plain,), {"choose": lambda *_: Mine(INDEX, weights=WEIGHTS)})()
    with torch.no_grad(), tp.prune(MODEL, strategy, image_tokens=IMAGE, strict=True) as found:
        MODEL(IDS)
    assert found.trace.stages[0].kind == "merge"


def test_a_class_that_cannot_be_made_is_named() -> None:
    class Unmade(Plain):
        def __init__(self, **options):
            raise KeyError("weights")

    plug(register_strategies=lambda self, register: register("unmade", Unmade))
    with pytest.raises(PluginError, match="'mine': strategy 'unmade' failed with KeyError: 'weights'"):
        tp.strategy("unmade")


# adapters ------------------------------------------------------------------------------------------------------------


class Toy(BoundModel, VisionCapture):
    """Binds `MODEL`; its methods are replaced by those of a test."""

    def __init__(self) -> None:
        self.name, self.decoder, self.tower_layers = "toy", MODEL, 2

    def offers(self):
        return frozenset({TowerFeatures})

    @contextlib.contextmanager
    def capture(self, reads):
        yield self

    def prompt_masks(self, queries):
        return PromptMasks(IMAGE, queries)

    def provide(self, read):
        return torch.ones(2, 6, 8)


class Look(Plain):
    def stages(self, shape):
        yield Stage("look", 1, 3, TowerFeatures())

    def choose(self, stage, tokens):
        return Keep.top(tokens.features.norm(dim=-1), 3)


def adapted(**parts: Any) -> None:
    """Register an adapter whose binding has these parts."""
    binding = type("Odd", (Toy,), parts)
    methods = {"matches": classmethod(lambda *_: True), "load": classmethod(raising(KeyError("shard")))}
    kind = type("Odd", (Adapter,), {**methods, "bind": classmethod(lambda _, model: binding())})
    plug(register_adapters=lambda self, register: register("odd", kind))


def watching(before: Callable[[], Any] = lambda: None, after: Callable[[], Any] = lambda: None) -> Any:
    @contextlib.contextmanager
    def capture(self, reads):
        before()
        try:
            yield self
        finally:
            after()

    return capture


KEY = KeyError("pixels")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"offers": raising(KEY)}, r"failed in offers\(\) with KeyError"),
        ({"offers": lambda _: {"features"}}, r"returned {'features'} from offers\(\), expected kinds of reads"),
        ({"capture": watching(before=raising(KEY))}, r"failed in capture\(\) with KeyError"),
        ({"capture": watching(after=raising(KEY))}, r"failed in capture\(\) with KeyError"),
        ({"capture": lambda self, reads: (yield self)}, r"failed in capture\(\) with (AttributeError|TypeError)"),
        (
            {"capture": lambda *_: contextlib.nullcontext(3)},
            r"yielded 3 from capture\(\), expected a tokenprune.engine.VisionCapture",
        ),
        ({"prompt_masks": raising(KEY)}, r"failed in prompt_masks\(\) with KeyError"),
        (
            {"prompt_masks": lambda *_: IMAGE},
            r"returned Tensor from prompt_masks\(\), expected tokenprune.engine.PromptMasks",
        ),
        ({"prompt_masks": lambda *_: MODEL(IDS)}, r"failed in prompt_masks\(\): the model was called from a strategy"),
        (
            {"prompt_masks": lambda *_: PromptMasks(INDEX + 2, {})},
            r"image_tokens: found \[2, 3\] int64 on cpu, expected bool",
        ),
        ({"prompt_masks": lambda *_: PromptMasks(IMAGE.float() / 2, {})}, r"image_tokens: found \[2, 12\] float32"),
        (
            {"prompt_masks": lambda *_: PromptMasks(IMAGE, {}, grid=IMAGE.long())},
            r"grid: found \[2, 12\] int64 on cpu, expected",
        ),
        (
            {"prompt_masks": lambda *_: PromptMasks(IMAGE.repeat(1, 2), {})},
            r"image_tokens: the mask of shape \[2, 24\] does not match a forward of",
        ),
        ({"provide": raising(KEY)}, r"failed in provide\(\) with KeyError"),
        ({"provide": lambda *_: torch.ones(2, 5, 8)}, r"the answer to TowerFeatures has shape \[2, 5, 8\]"),
    ],
)
def test_what_an_adapter_tells_of_a_model(parts: dict[str, Any], message: str) -> None:
    adapted(**parts)
    with pytest.raises((PluginError, InputError), match=f"adapter 'odd'.*{message}") as told:
        run(Look(), vision=None)
    assert "'mine'" in str(told.value)
    if isinstance(told.value, PluginError) and "KeyError" in message:
        assert told.value.__cause__ is KEY


@pytest.mark.parametrize("watch", [watching(), watching(after=raising(KEY)), lambda *_: contextlib.suppress(Exception)])
def test_an_error_of_the_caller_is_never_the_adapters(watch: Any) -> None:
    if watch.__name__ == "<lambda>":
        watch = _swallowing
    adapted(watch=watch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PluginWarning)
        with pytest.raises(ZeroDivisionError):
            run(Look(), lambda: 1 / 0, vision=None)
    ours = [str(warning.message) for warning in told if warning.category is PluginWarning]
    assert all("adapter 'odd' failed in capture() with KeyError" in message for message in ours)


@contextlib.contextmanager
def _swallowing(self, reads):
    with contextlib.suppress(Exception):
        yield self


def test_load_and_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    adapted(provide=raising(torch.OutOfMemoryError("full")))
    with pytest.raises(PluginError, match=r"'mine': adapter 'odd' failed in load\(\) with KeyError: 'shard'"):
        tp.load(tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        run(Look(), vision=None)
