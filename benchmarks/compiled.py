"""`torch.compile` against eager code: prefill and decoding step, with and without pruning, in both kinds of KV cache.

Both sides of a ratio, and all rows, run in turn in every round of one process, so that drift of the machine hits all
alike. A row's outputs are checked to agree before anything is timed; the first calls, which compile, are timed alone.

    python benchmarks/compiled.py [--layers 4] [--width 1024] [--dtype bfloat16] [--device cpu] [--json compiled.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaModel, StaticCache

import tokenprune as tp
from tokenprune.evaluation.environment import describe
from tokenprune.utils.stopwatch import TOTAL, recorded

BEFORE, TEXT = 4, 36
SIDES = ("eager", "compiled")


def decoder(layers: int, width: int) -> LlamaModel:
    """A random LLaMA-shaped decoder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
    )
    return LlamaModel(config).eval()


@dataclass
class Row:
    """A prefill and its decoding steps, eager and compiled.

    Attributes:
        strategy: name of the strategy; "untouched" without a context.
        cache: "dynamic" or "static".
        times: milliseconds of each round, by phase and side.
        warm_up: milliseconds of the calls that compiled, by phase.
    """

    strategy: str
    cache: str
    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    warm_up: dict[str, float] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """The figures of the row."""
        phases: dict[str, Any] = {}
        for phase in ("prefill", "step"):
            sides = [self.times[phase, side] for side in SIDES]
            medians, minima = [statistics.median(side) for side in sides], [min(side) for side in sides]
            phases[phase] = {
                "warm_up_ms": round(self.warm_up[phase], 1),
                **{f"{side}_ms": round(median, 3) for side, median in zip(SIDES, medians, strict=True)},
                **{f"{side}_min_ms": round(least, 3) for side, least in zip(SIDES, minima, strict=True)},
                "ratio": round(medians[1] / medians[0], 3),
                "ratio_of_minima": round(minima[1] / minima[0], 3),
            }
        return {"strategy": self.strategy, "cache": self.cache, **phases}


class Runner:
    """The calls of a row on one model.

    Args:
        model: the decoder.
        image: number of image tokens.
        steps: decoding steps after a prefill, for the length of static caches.
        options: of `torch.compile`.
        eager_prefill: whether both sides run the prefill eagerly, as `generate` does.
    """

    def __init__(
        self, model: LlamaModel, image: int, steps: int, options: dict[str, Any], eager_prefill: bool = False
    ) -> None:
        self.model, self._eager_prefill = model, eager_prefill
        self.called: dict[str, Callable[..., Any]] = {"eager": model, "compiled": torch.compile(model, **options)}
        weight = next(model.parameters())
        shape = 1, BEFORE + image + TEXT, model.config.hidden_size
        self.embeds = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        self.token = torch.randn(1, 1, shape[2], dtype=weight.dtype, device=weight.device)
        self.marks = torch.zeros(shape[:2], dtype=torch.bool, device=weight.device)
        self.marks[:, BEFORE : BEFORE + image] = True
        self._length = shape[1] + steps

    def context(self, strategy: tp.Strategy | None) -> AbstractContextManager[Any]:
        """In which a row runs."""
        return nullcontext() if strategy is None else tp.prune(self.model, strategy, image_tokens=self.marks)

    def empty(self, cache: str) -> Cache:
        """A cache."""
        if cache == "dynamic":
            return DynamicCache()
        return StaticCache(config=self.model.config, max_cache_len=self._length)

    def prefill(self, side: str, cache: Cache) -> Tensor:
        """The states of the prompt."""
        called = self.model if self._eager_prefill else self.called[side]
        return called(inputs_embeds=self.embeds, past_key_values=cache).last_hidden_state

    def step(self, side: str, cache: Cache) -> Tensor:
        """The state of one more token."""
        return self.called[side](inputs_embeds=self.token, past_key_values=cache).last_hidden_state


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call, after which every device has finished."""
    with recorded() as times:
        call()
    return times[TOTAL]


def warm_up(runner: Runner, row: Row, strategy: tp.Strategy | None, tolerance: float) -> None:
    """Compile the row's code, and check what it computes. Growing caches compile in the first two steps."""
    outputs: dict[str, list[Tensor]] = {side: [] for side in SIDES}

    def call(run: Callable[[str, Cache], Tensor], side: str, cache: Cache, times: int) -> None:
        outputs[side].extend(run(side, cache).clone() for _ in range(times))

    with runner.context(strategy):
        for side in SIDES:  # the figures that stay are those of the second
            cache = runner.empty(row.cache)
            row.warm_up["prefill"] = timed(partial(call, runner.prefill, side, cache, 1))
            row.warm_up["step"] = timed(partial(call, runner.step, side, cache, 3))
    for eager, compiled in zip(*(outputs[side] for side in SIDES), strict=True):
        torch.testing.assert_close(compiled.float(), eager.float(), rtol=tolerance, atol=tolerance)


def measure(runner: Runner, row: Row, strategy: tp.Strategy | None, steps: int, first: int) -> None:
    """One round of a row: both sides in turn."""
    order = SIDES if first % 2 else SIDES[::-1]
    with runner.context(strategy):
        caches = {side: runner.empty(row.cache) for side in SIDES}
        for side in order:
            spent = timed(partial(runner.prefill, side, caches[side]))
            row.times.setdefault(("prefill", side), []).append(spent)
        for _ in range(steps):
            for side in order:
                spent = timed(partial(runner.step, side, caches[side]))
                row.times.setdefault(("step", side), []).append(spent)


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--image", type=int, default=576, help="image tokens")
    parser.add_argument("--strategies", nargs="*", default=["untouched", "uniform", "fastv"])
    parser.add_argument("--budget", type=float, default=0.35)
    parser.add_argument("--caches", nargs="*", default=["dynamic", "static"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps in each round")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--mode", help="of torch.compile, such as reduce-overhead")
    parser.add_argument("--eager-prefill", action="store_true", help="for CUDA graphs, which need a filled cache")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    model = decoder(given.layers, given.width).to(given.device, getattr(torch, given.dtype))
    options = {"backend": given.backend, **({"mode": given.mode} if given.mode else {})}
    runner = Runner(model, given.image, max(given.steps, 3), options, given.eager_prefill)
    strategies = {name: tp.strategy(name, budget=given.budget) for name in given.strategies if name != "untouched"}
    rows = [Row(name, cache) for name in given.strategies for cache in given.caches]
    with torch.no_grad():
        for row in rows:
            warm_up(runner, row, strategies.get(row.strategy), 1e-3 if given.dtype == "float32" else 0.1)
        for number in range(given.rounds):
            for row in rows:
                measure(runner, row, strategies.get(row.strategy), given.steps, number)
    told = [row.told() for row in rows]
    console = Console()
    if not console.is_terminal:
        console.width = 140
    table = Table(title=f"{given.layers} layers of width {given.width}, {given.dtype}: medians in ms, compiled / eager")
    for name in ("strategy", "cache", "phase", "first calls", "eager", "compiled", "ratio", "of minima"):
        table.add_column(name, justify="left" if name in ("strategy", "cache", "phase") else "right")
    for one in told:
        for phase in ("prefill", "step"):
            figures = [
                one[phase][name] for name in ("warm_up_ms", "eager_ms", "compiled_ms", "ratio", "ratio_of_minima")
            ]
            table.add_row(one["strategy"], one["cache"], phase, *map(str, figures))
    console.print(table)
    if given.json:
        asked = {name: value for name, value in vars(given).items() if name != "json"}
        given.json.write_text(json.dumps({**describe(model), **asked, "rows": told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
