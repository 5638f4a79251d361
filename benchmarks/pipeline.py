"""What a user waits for, from picture to mask, stage by stage, in models of LISA's, GLaMM's and PixelLM's sizes.

The baseline encodes the picture with both towers and answers by transformers' own `generate` (KV cache, sdpa, greedy).
Each row runs in turn with the others in every round, so that drift of the machine hits all alike; ratios are to the
baseline of the same round. Weights are random, sizes and dtype real, and every row says the same ten tokens (checked).

    python benchmarks/pipeline.py [--shape lisa-7b] [--dtype bfloat16] [--rounds 3] [--layers N] [--decoder]
                       [--json pipeline.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_lisa import SHAPES, LisaShape, random_lisa
from random_pixellm import random_pixellm
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

import tokenprune as tp
from tokenprune.evaluation.environment import describe
from tokenprune.utils.stopwatch import TOTAL, recorded, stage
from tokenprune_adapters.segmentation.segmenter import Segmenter

QUERY = "the circle"
QUERIES = ["the circle", "the red square", "the star", "the cat", "a dog", "the tree", "the left car", "the moon"]
PRUNED = {
    "csp-65": ("csp", 0.35, {}),
    "csp-70": ("csp", 0.30, {}),
    "fastv": ("fastv", 0.35, {}),
    "divprune": ("divprune", 0.35, {"positions": "keep"}),
    "uniform": ("uniform", 0.35, {}),
}
DECODER = ("pruning context", "generation")  # stages of the decoder; the others are towers and the mask head

Times = dict[str, float]


@dataclass
class Row:
    """A way to answer.

    Attributes:
        name: in the table.
        run: the call that is measured.
        times: by stage in milliseconds, one entry a round.
        base: how many baseline calls it replaces.
    """

    name: str
    run: Callable[[], None]
    times: list[Times]
    base: int = 1


class Pipeline:
    """The rows of a model.

    Args:
        model: says the same answer to every prompt.
        decoder_only: every row takes the picture as encoded before, so that no tower runs.
        seed: of the picture.
    """

    def __init__(self, model: Segmenter, decoder_only: bool = False, seed: int = 0) -> None:
        self.model, self.decoder_only = model, decoder_only
        self.image = np.random.default_rng(seed).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        self.model.segment(self.image, QUERY, answer="generate")  # also teaches the answer
        self.text = self.model.segment(self.image, QUERY, answer="generate").text
        with torch.inference_mode():
            self.encoded = self.model.encode_image(self.image) if decoder_only else None

    def baseline(self) -> None:
        """transformers' `generate`, then the mask head."""
        model = self.model
        encoded = self.encoded or model.encode_image(self.image)
        sequence = model.inputs_of(model.prompts([QUERY], "generate"), encoded, continues=True).sequence
        with stage("generation"):
            ids = model.decoder.generate(
                inputs_embeds=sequence.inputs_embeds,
                attention_mask=sequence.attention_mask,
                max_new_tokens=64,
                do_sample=False,
            )
        assert model.tokenizer.decode(ids[0].tolist()) == self.text
        with stage("mask decoder"):
            # of the right shape; its values do not matter for the time
            states = sequence.inputs_embeds[:, -1].expand(len(model.seg_tokens), -1)
            low_res, _ = model.low_res_logits(states, encoded)
            model.to_original_size(low_res, encoded)

    def segment(
        self, strategy: Any = None, queries: str | Sequence[str] = QUERY, draft: bool = True, again: bool = False
    ) -> None:
        """Our call; with `again`, of a picture that was encoded before."""
        if not (again or self.decoder_only):
            self.model.image_cache.clear()
        found = self.model.segment(self.image, queries, strategy, answer="generate", draft=draft)
        assert set([found.text] if isinstance(found.text, str) else found.text) == {self.text}

    def rows(self) -> list[Row]:
        """The baseline first."""
        run = self.segment
        strategies = {
            name: tp.strategy(kind, budget=budget, **options) for name, (kind, budget, options) in PRUNED.items()
        }
        made = [Row("baseline", self.baseline, []), Row("no draft", lambda: run(draft=False), [])]
        made.append(Row("draft", run, []))
        for name, strategy in strategies.items():
            made.append(Row(name, lambda s=strategy: run(s, draft=False), []))
            made.append(Row(f"{name} + draft", lambda s=strategy: run(s), []))
        best = strategies["csp-65"]
        made.append(Row("second query, csp-65 + draft", lambda: run(best, again=True), []))
        made.append(Row("8 queries, draft", lambda: run(queries=QUERIES), [], 8))
        made.append(Row("8 queries, csp-65 + draft", lambda: run(best, QUERIES), [], 8))
        return made


def measure(rows: Sequence[Row], rounds: int, warm_up: int, console: Console) -> None:
    """Run all rows in turn, after rounds that are not counted."""
    for number in range(1 - warm_up, rounds + 1):
        for row in rows:
            with torch.inference_mode(), recorded() as times:
                row.run()
            console.print(f"round {number} {row.name}: {times[TOTAL] / 1e3:.2f} s", style="dim")
            if number > 0:
                row.times.append(dict(times))


def decoder_time(times: Times) -> float:
    """Prefill and decoding, in milliseconds."""
    return sum(times.get(name, 0.0) for name in DECODER)


def report(rows: Sequence[Row], shape: LisaShape, about: dict[str, Any]) -> dict[str, Any]:
    """All figures: medians and minima in milliseconds, and medians of the ratios within each round."""
    base = rows[0].times
    found = []
    for row in rows:
        both = list(zip(row.times, base, strict=True))
        names = [name for name in row.times[0] if name != TOTAL]
        found.append(
            {
                "row": row.name,
                "baseline_calls": row.base,
                "median_ms": {name: statistics.median(t.get(name, 0.0) for t in row.times) for name in (*names, TOTAL)},
                "min_ms": {name: min(t.get(name, 0.0) for t in row.times) for name in (*names, TOTAL)},
                "decoder_ratios": [decoder_time(t) / (row.base * decoder_time(b)) for t, b in both],
                "ratios": [t[TOTAL] / (row.base * b[TOTAL]) for t, b in both],
            }
        )
    return {"shape": vars(shape), **about, "rows": found}


def profile(row: Row, device: str) -> list[dict[str, Any]]:
    """The operations that took longest in one more call of a row, with their share of its time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as profiler:
        row.run()
    kind = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events)
    return [
        {"operation": event.key, "calls": event.count, "share": round(getattr(event, kind) / total, 4)}
        for event in events[:12]
    ]


def table(found: dict[str, Any]) -> Table:
    """Stages in seconds, and ratios to as many baseline calls."""
    made = Table(title=f"{found['shape']['name']}, {found['dtype']}, medians in seconds; ratios to the baseline")
    stages = ("vision tower", "mask encoder", *DECODER, "mask decoder", TOTAL)
    for name in ("", *stages, "decoder ratio", "ratio (spread)"):
        made.add_column(name, justify="left" if not name else "right")
    for row in found["rows"]:
        seconds = [f"{row['median_ms'].get(name, 0.0) / 1e3:.2f}" for name in stages]
        spread = f"{statistics.median(row['ratios']):.3f} ({min(row['ratios']):.3f}–{max(row['ratios']):.3f})"
        made.add_row(row["row"], *seconds, f"{statistics.median(row['decoder_ratios']):.3f}", spread)
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="lisa-7b")
    parser.add_argument("--layers", type=int, help="of the decoder, if not all")
    parser.add_argument("--decoder", action="store_true", help="without towers: the picture is encoded before all rows")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before; the model has run twice before them")
    parser.add_argument("--rows", nargs="*", help="names, besides the baseline; all by default")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--profile", metavar="ROW", help="also profile one more call of this row")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    shape = SHAPES[given.shape]
    if given.layers:
        shape = replace(shape, layers=given.layers)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    make = random_pixellm if shape.sam is None else random_lisa
    pipeline = Pipeline(make(shape, getattr(torch, given.dtype), given.device), given.decoder)
    rows = pipeline.rows()
    if given.rows:
        rows = [rows[0], *(row for row in rows[1:] if row.name in given.rows)]
    measure(rows, given.rounds, given.warm_up, console)
    about = {"rounds": given.rounds, **describe(pipeline.model.decoder)}
    found = report(rows, shape, about)
    console.print(table(found))
    if given.profile:
        found["profile"] = {
            given.profile: profile(next(row for row in rows if row.name == given.profile), given.device)
        }
        console.print(found["profile"])
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
