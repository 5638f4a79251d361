"""Overhead of the engine: a pruned prefill against a hand-sliced run of the very same layers.

The hand-sliced run knows the chosen tokens in advance: it gathers states and rotary tables wherever the active set
changes, calls the decoder layers itself and does nothing else. So the ratio holds everything that the engine and the
strategy add: hooks, bookkeeping, trace, scoring and choosing. A second ratio compares runs that prune nothing with the
untouched model. Both sides of a ratio run in turn within one process, so that drift of the machine hits both alike;
outputs are checked to agree before anything is timed.

    python benchmarks/engine_overhead.py [--rounds 15] [--sizes "7B"] [--device cpu] [--json overhead.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

import tokenprune
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace


@dataclass(frozen=True)
class Size:
    """A decoder and a prompt."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    batch: int
    image: int
    text: int = 36
    dtype: torch.dtype = torch.float32

    def model(self) -> LlamaModel:
        """A random decoder of this size."""
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # the whole model would not fit twice
        try:
            return LlamaModel(config).eval()
        finally:
            torch.set_default_dtype(before)


SIZES = [
    Size("tiny", 12, 192, 512, 6, batch=1, image=256),
    Size("tiny, batch 8", 12, 192, 512, 6, batch=8, image=256),
    Size("small", 8, 512, 1376, 8, batch=1, image=576),
    Size("deep", 32, 512, 1376, 8, batch=1, image=576),
    Size("wide", 4, 1024, 2752, 16, batch=1, image=576),
    Size("7B layers", 4, 4096, 11008, 32, batch=1, image=576),
    Size("7B", 32, 4096, 11008, 32, batch=1, image=576, dtype=torch.bfloat16),
]
LONG = {"7B layers", "7B"}  # minutes on a CPU: only by name
STRATEGIES = {
    "uniform": {"keep": 0.25},
    "fastv": {"layer": 2, "keep": 0.5},
    "pyramiddrop": {"positions": "keep"},
    "csp": {},
}


def hand_sliced(model: LlamaModel, embeds: Tensor, trace: Trace) -> Tensor:
    """The run of a trace by hand: [batch, S, width], with equally many tokens in every row and no padding."""
    length = embeds.shape[1]
    ids = torch.arange(length, device=embeds.device)[None]
    cos, sin = model.rotary_emb(embeds, position_ids=ids)
    boundaries = {stage.layer for stage in trace.stages}
    short, index, tables = embeds, None, (cos, sin)
    full = embeds
    for number, layer in enumerate(model.layers):
        if number in boundaries:
            full = short if index is None else full.scatter(1, _wide(index, short), short)
            index = _positions(trace, number)
            short = full.gather(1, _wide(index, full))
            tables = tuple(
                t.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, t.shape[-1])) for t in (cos, sin)
            )
        output = layer(
            short, attention_mask=None, position_embeddings=tables, position_ids=ids if index is None else index
        )
        short = output[0] if isinstance(output, tuple) else output
    full = short if index is None else full.scatter(1, _wide(index, short), short)
    return model.norm(full)


def _wide(index: Tensor, states: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, states.shape[-1])


def _positions(trace: Trace, layer: int) -> Tensor:
    present = ~trace.layout.image_tokens
    present[trace.layout.image_tokens] = trace.active(layer).flatten()
    return present.nonzero()[:, 1].reshape(len(present), -1)


@dataclass(frozen=True)
class Paired:
    """Two calls timed in turn: medians in milliseconds, and the first over the second, by medians and by minima.

    Minima are what the work takes undisturbed, medians what a user of this machine saw.
    """

    one: float
    other: float
    ratio: float
    ratio_of_minima: float


def compare(
    one: Callable[[], object],
    other: Callable[[], object],
    rounds: int,
    warm_up: int,
    device: str,
    clock: Callable[[], float],
) -> Paired:
    """Time both in turn, the order reversed from round to round, after rounds that do not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(rounds + warm_up):
        for which in (0, 1) if step % 2 else (1, 0):
            _wait(device)
            start = clock()
            (one, other)[which]()
            _wait(device)
            if step >= warm_up:
                times[which].append(1000 * (clock() - start))
    medians = [statistics.median(side) for side in times]
    return Paired(*medians, medians[0] / medians[1], min(times[0]) / min(times[1]))


def check_equal(one: Tensor, other: Tensor) -> None:
    """Raise AssertionError if states differ by more than rounding in their type."""
    if one.dtype == torch.float32:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    else:  # rounding grows from layer to layer
        difference = float((one.float() - other.float()).norm() / other.float().norm())
        assert difference < 0.02, f"the states differ by {difference:.3f} of their size"


def flops_of(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products and the attention of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(
    size: Size, strategies: dict[str, Strategy], rounds: int, warm_up: int, device: str, clock: Callable[[], float]
) -> list[dict[str, object]]:
    """Rows of the result for one size."""
    model = size.model().to(device)
    embeds = torch.randn(size.batch, size.image + size.text, size.hidden, device=device, dtype=size.dtype)
    marks = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=device)
    marks[:, 4 : 4 + size.image] = True

    def engine(strategy: Strategy) -> tuple[Tensor, Trace]:
        with tokenprune.prune(model, strategy, image_tokens=marks) as run:
            output = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return output, run.trace

    def untouched() -> Tensor:
        return model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    rows: list[dict[str, object]] = []
    for name, strategy in strategies.items():
        pruned, trace = engine(strategy)
        if trace.ledger.equivalent_tokens_ratio < 1:
            baseline, against = (lambda trace=trace: hand_sliced(model, embeds, trace)), "hand-sliced"
        else:
            baseline, against = untouched, "untouched"
        check_equal(pruned, baseline())
        timed = compare(lambda strategy=strategy: engine(strategy), baseline, rounds, warm_up, device, clock)
        rows.append(
            {
                "size": size.name,
                "strategy": name,
                "against": against,
                "equivalent_tokens_ratio": round(trace.ledger.equivalent_tokens_ratio, 4),
                "engine_ms": round(timed.one, 2),
                "baseline_ms": round(timed.other, 2),
                "flops_ratio": round(flops_of(lambda strategy=strategy: engine(strategy)) / flops_of(baseline), 4),
                "ratio": round(timed.ratio, 3),
                "ratio_of_minima": round(timed.ratio_of_minima, 3),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds per pair")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="*", help=f"some of: {', '.join(size.name for size in SIZES)}")
    parser.add_argument("--strategies", nargs="*", help=f"some of: none, keep-all, {', '.join(STRATEGIES)}")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of this process instead of wall time")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    strategies = {"none": tokenprune.strategy("none"), "keep-all": tokenprune.strategy("uniform", keep=1.0)}
    strategies |= {name: tokenprune.strategy(name, **options) for name, options in STRATEGIES.items()}
    strategies = {name: own for name, own in strategies.items() if name in (given.strategies or strategies)}
    clock = time.process_time if given.cpu_time else time.perf_counter
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for size in SIZES:
            if size.name in given.sizes if given.sizes else size.name not in LONG:
                rows += measure(size, strategies, given.rounds, given.warm_up, given.device, clock)
    table = Table("size", "strategy", "tokens", "engine ms", "baseline ms", "FLOPs", "ratio", "of minima")
    table.caption = "baseline: the untouched model where nothing is pruned, else a hand-sliced run"
    for row in rows:
        table.add_row(*(str(value) for name, value in row.items() if name != "against"))
    Console().print(table)
    if given.json:
        environment = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": given.device,
            "clock": clock.__name__,
            "rounds": given.rounds,
        }
        given.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
