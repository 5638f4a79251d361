"""Peak memory of pruned prefills, as ratios to the untouched model's in one process.

On a CPU the bytes of live tensors are counted (weights and inputs left out, kernels' own scratch space unseen); the
figures are the same at every run. On CUDA the allocator's peak above what was there before is read.

    python benchmarks/peak_memory.py [--device cpu] [--dtype float32] [--json peak.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import tokenprune as tp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from memory_meter import MemoryMeter

IMAGES, TEXT, BEFORE = 576, 36, 10
CONTENDERS = [("none", None), *((name, budget) for name in ("uniform", "fastv", "csp") for budget in (0.35, 0.6, 0.85))]


def peak(model: LlamaModel, embeds: Tensor, image: Tensor, strategy: tp.Strategy | None, cached: bool) -> int:
    """Bytes that one prefill takes at most."""

    def call() -> None:
        if strategy is None:
            model(inputs_embeds=embeds, use_cache=cached)
            return
        with tp.prune(model, strategy, image_tokens=image):
            model(inputs_embeds=embeds, use_cache=cached)

    if embeds.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with MemoryMeter() as meter:
        call()
    return meter.peak


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 43 // 16,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        attn_implementation=given.attention,
    )
    model = LlamaModel(config).eval().to(given.device, getattr(torch, given.dtype))
    embeds = torch.randn(1, IMAGES + TEXT, given.hidden).to(given.device, getattr(torch, given.dtype))
    image = torch.zeros(1, IMAGES + TEXT, dtype=torch.bool)
    image[:, BEFORE : BEFORE + IMAGES] = True
    rows = []
    with torch.no_grad():
        full = {cached: peak(model, embeds, image, None, cached) for cached in (False, True)}
        for name, budget in CONTENDERS:
            strategy = tp.strategy(name) if budget is None else tp.strategy(name, budget=budget)
            ratios = {cached: peak(model, embeds, image, strategy, cached) / full[cached] for cached in (True, False)}
            rows.append({"strategy": name, "budget": budget, "cached": ratios[True], "uncached": ratios[False]})
    table = Table("strategy", "budget", "with a KV cache", "without")
    for row in rows:
        table.add_row(row["strategy"], str(row["budget"] or ""), f"{row['cached']:.3f}", f"{row['uncached']:.3f}")
    Console().print(table)
    print(f"untouched: {full[True] / 2**20:.1f} MiB with a KV cache, {full[False] / 2**20:.1f} MiB without")
    if given.json:
        told = {"torch": torch.__version__, "untouched_bytes": {"cached": full[True], "uncached": full[False]}}
        given.json.write_text(
            json.dumps({**told, **{k: str(v) for k, v in vars(given).items()}, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
