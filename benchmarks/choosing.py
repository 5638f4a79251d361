"""What choosing costs: the time of every strategy's selectors as a share of the prefill time that they save.

One random decoder layer of LLaMA-7B's size is timed on several lengths; a length between them is read off a quadratic.
A strategy at its budget then walks through 32 such layers without running them: the engine enters its stages on random
states of that size, and what is timed is all that happens on entering one (reading states, keys and attention rows,
attention computed ahead, choosing, checking, merging), and computing attention rows beside a layer's own attention.
What the vision tower computes for a strategy is not counted; what the projector computes for it is.

    share = time of the selectors / Σ over layers of (a layer on all tokens − a layer on the tokens left)

Times are processor time of all threads unless --wall, so that other work on the machine counts for little; medians.

    python benchmarks/choosing.py [--tokens 576 2880] [--budget 0.25] [--json selectors.json]
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for each other take no processor time
sys.path.remove(sys.path[0])  # a script's folder comes first, where this file would stand for the library's `selectors`
import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import tokenprune
from tokenprune.core import reads
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.strategy import Strategy
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.reads.attention_tap import AttentionCall
from tokenprune.errors import TokenPruneError
from tokenprune.evaluation.contenders import contenders

LAYERS, WIDTH, INNER, HEADS, TOWER, CLIP = 32, 4096, 11008, 32, 1024, 768
BEFORE, AFTER = 35, 25  # text tokens before and after the image, as in LLaVA's prompts
TYPE = torch.bfloat16
Clock = Callable[[], float]


def one_layer() -> LlamaModel:
    """A decoder of one random layer."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        attn_implementation="sdpa",
        dtype=TYPE,
    )
    torch.manual_seed(0)
    return LlamaModel(config).to(TYPE).eval()


def layer_time(model: LlamaModel, lengths: Sequence[int], rounds: int, clock: Clock) -> Callable[[int], float]:
    """Seconds that the layer takes on a length, from a quadratic through the measured ones."""
    measured = []
    for length in lengths:
        states, ids = torch.randn(1, length, WIDTH, dtype=TYPE), torch.arange(length)[None]
        tables = model.rotary_emb(states, position_ids=ids)

        def run(states: Tensor = states, tables: Any = tables, ids: Tensor = ids) -> Any:
            return model.layers[0](states, attention_mask=None, position_embeddings=tables, position_ids=ids)

        run()
        measured.append(statistics.median(timed(run, clock) for _ in range(rounds)))
    x = torch.tensor(lengths, dtype=torch.float64)
    weight = 1 / torch.tensor(measured, dtype=torch.float64)  # relative errors, so that short lengths count as well
    powers = torch.stack((x, x * x), 1) * weight[:, None]
    first, second = torch.linalg.lstsq(powers, torch.ones(len(x), 1, dtype=torch.float64)).solution.flatten().tolist()
    return lambda length: first * length + second * length * length


def timed(call: Callable[[], Any], clock: Clock) -> float:
    """Seconds of one call."""
    start = clock()
    call()
    return clock() - start


def vision(tokens: int) -> VisionSource:
    """Synthetic answers of a CLIP ViT-L tower and LLaVA's projector."""
    draw = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw)

    projector = nn.Sequential(nn.Linear(TOWER, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(TYPE)
    features, keys, scores = drawn(tokens, TOWER), drawn(tokens, TOWER), drawn(tokens).softmax(1)
    made: dict[type[reads.Read], Callable[[Any], Any]] = {
        reads.TowerFeatures: lambda read: features.to(TYPE),
        reads.ClsAttention: lambda read: scores,
        reads.ReceivedAttention: lambda read: scores,
        reads.TowerKeys: lambda read: keys[..., :64] if read.heads == "mean" else keys,
        reads.Projector: lambda read: lambda taken: projector(taken.to(TYPE)),
        reads.TowerValues: lambda read: keys,
        reads.TowerStates: lambda read: features,
        reads.ClsFeatures: lambda read: features[:, :1].expand_as(features).to(TYPE),
        reads.ClsQuery: lambda read: keys[:, :1].expand_as(keys),
        reads.Crops: lambda read: torch.zeros(1, tokens, dtype=torch.int64),
        reads.ClipImageEmbeddings: lambda read: features[..., :CLIP],
        reads.ClipTextEmbeddings: lambda read: (keys[:, :1, :CLIP], torch.ones(1, 1, dtype=torch.bool)),
    }
    return VisionSource(made, layers=24)


def walk(strategy: Strategy, model: LlamaModel, tokens: int, source: VisionSource, clock: Clock) -> tuple[float, Any]:
    """Seconds that the selectors take in one prefill, and its ledger."""
    length = BEFORE + tokens + AFTER
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, BEFORE : BEFORE + tokens] = True
    layers = tuple(model.layers) * LAYERS
    decoder = Decoder(model, layers, layers, model.rotary_emb)
    prefill = Prefill(strategy, SequenceLayout.from_mask(mask), decoder, vision=source)
    draw, spent = torch.Generator().manual_seed(2), 0.0
    hidden = torch.randn(1, length, WIDTH, generator=draw).to(TYPE)
    ids = torch.arange(length)[None]
    tables = model.rotary_emb(hidden, position_ids=ids)
    enter = prefill.enter

    def entered(layer: int) -> None:
        nonlocal spent
        spent += timed(lambda: enter(layer), clock)

    prefill.enter = entered  # type: ignore[method-assign]
    for layer in range(LAYERS):
        kwargs = {"attention_mask": None, "position_embeddings": tables, "position_ids": ids}
        hidden = prefill.before_layer(layer, hidden, kwargs)
        if layer in prefill.reads.taps:
            parts = torch.randn(3, 1, HEADS, hidden.shape[1], WIDTH // HEADS, generator=draw).to(TYPE)
            seen = AttentionCall(*parts, mask=None, scaling=(WIDTH // HEADS) ** -0.5, causal=True)
            spent += timed(lambda layer=layer, seen=seen: prefill.record_attention(layer, seen), clock)
        hidden = prefill.after_layer(layer, hidden)
    return spent, prefill.trace.ledger


def measure(names: Sequence[str], tokens: int, budget: float, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """A row per strategy that prunes."""
    model, source = one_layer(), vision(tokens)
    text = BEFORE + AFTER
    lengths = [text + round(tokens * share) for share in (0.05, 0.15, 0.3, 0.5, 0.75, 1)]
    seconds = layer_time(model, lengths, max(3, rounds // 2), clock)
    rows = []
    for name in names:
        row: dict[str, Any] = {"tokens": tokens, "strategy": name}
        rows.append(row)
        try:
            (contender,) = contenders([name], budget)
            walk(contender.strategy, model, tokens, source, clock)
            walks = [walk(contender.strategy, model, tokens, source, clock) for _ in range(rounds)]
        except TokenPruneError as error:
            row["refused"] = str(error)
            continue
        selector, ledger = statistics.median(spent for spent, _ in walks), walks[-1][1]
        left = [entry.image[0] + entry.other[0] for entry in ledger.entries]
        saved = sum(seconds(text + tokens) - seconds(length) for length in left)
        row |= {
            "equivalent_tokens_ratio": round(ledger.equivalent_tokens_ratio, 4),
            "selector_ms": round(1000 * selector, 2),
            "saved_ms": round(1000 * saved, 1),
            "share": round(selector / saved, 5) if saved > 0 else None,
            "layer_ms": round(1000 * seconds(text + tokens), 1),
        }
    return rows


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[576, 2880], help="image tokens")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds per strategy")
    parser.add_argument("--strategies", nargs="*", help="names; all that are registered and prune by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wall", action="store_true", help="wall time instead of processor time")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.strategies or [name for name in tokenprune.strategies() if name not in ("none", "blind")]
    clock = time.perf_counter if given.wall else time.process_time
    table = Table(
        *("image tokens", "strategy", "equivalent / N", "selectors, ms", "saved, ms", "share"),
        title=f"selectors at budget {given.budget:g}, {LAYERS} layers of width {WIDTH}, bfloat16",
    )
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for tokens in given.tokens:
            rows += measure(names, tokens, given.budget, given.rounds, clock)
    for row in rows:
        if "refused" in row:
            table.add_row(str(row["tokens"]), row["strategy"], row["refused"])
            continue
        share = "–" if row["share"] is None else f"{row['share']:.3%}"
        cells = (row["equivalent_tokens_ratio"], row["selector_ms"], row["saved_ms"])
        table.add_row(str(row["tokens"]), row["strategy"], *map(str, cells), share)
    Console(width=140).print(table)
    if given.json:
        about = {
            "budget": given.budget,
            "rounds": given.rounds,
            "threads": given.threads,
            "clock": "wall" if given.wall else "processor",
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenprune": tokenprune.__version__,
        }
        given.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
