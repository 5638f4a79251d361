"""Overhead of a sweep: what it takes beyond the calls of the model.

The bare loop encodes each image once and calls `segment` with every strategy; it measures and stores nothing. The sweep
does the same and measures masks, tokens and FLOPs, packs masks, and writes every scene to the disk. Both run in turn in
one process, on scenes that are made before, with a model that is loaded before; the sweep starts with an empty store.

The first scene is timed apart: with it a sweep measures, once for every strategy and budget, what choosing costs. The
ratio is that of the scenes after it; what the first one takes more is given in scenes.

    python benchmarks/sweep_overhead.py [--rounds 5] [--limit 24] [--clock cpu] [--profile] [--json overhead.json]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tokenprune
from tokenprune.datasets.base import Dataset, Scene
from tokenprune.evaluation.contenders import contenders
from tokenprune.sweeps import worker

STRATEGIES = "none,random,uniform,csp,fastv,prumerge+"
BUDGETS = "0.5,0.35,0.25,0.15"


class Made(Dataset):
    """Scenes that were made before anything is timed."""

    name = "made"
    splits = ("val",)
    made: tuple[Scene, ...] = ()

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """All of them."""
        yield from self.made


def bare(model: Any, scenes: list[Scene], strategies: list[Any], clock: Callable[[], float]) -> list[float]:
    """The calls of the model alone; the times when scenes were done, after that of the start."""
    times = [clock()]
    with torch.no_grad():
        for number, scene in enumerate(scenes):
            encoded = model.encode_image(scene.image)
            texts = [query.text for query in scene.queries]
            sentences = [query.is_sentence for query in scene.queries]
            for strategy in strategies:
                model.segment(encoded, texts, strategy.reseeded(number), is_sentence=sentences)
            times.append(clock())
    return times


def swept(config: dict[str, Any], clock: Callable[[], float]) -> list[float]:
    """A sweep; the times when scenes were stored, after that of the start."""
    times = [clock()]
    with tempfile.TemporaryDirectory() as folder:
        tokenprune.sweep(config, folder, progress=lambda now: times.append(clock()))
    return times[:-1]  # the last report is of no scene


def main() -> None:
    """Measure, print, write JSON if asked."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=24, help="queries")
    parser.add_argument("--model", default="lisa-tiny")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: where others use the machine")
    parser.add_argument("--profile", action="store_true", help="print what one sweep spends its time on instead")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()

    data = tokenprune.dataset(given.dataset)
    scenes = list(data.scenes("val", given.limit))
    Made.made, Made.kinds = tuple(scenes), data.kinds
    model = tokenprune.load(given.model)
    budgets = [float(budget) for budget in given.budgets.split(",")]
    names = given.strategies.split(",")
    strategies = [one.strategy for one in contenders(names, budgets)]
    config = {"models": given.model, "datasets": f"{__name__}:Made", "strategies": names, "budgets": budgets}
    worker.Models.get = lambda self, entry: model  # type: ignore[method-assign]  # loaded already

    clock: Callable[[], float] = time.process_time if given.clock == "cpu" else time.perf_counter
    if given.profile:
        swept(config, clock)
        with cProfile.Profile() as profile:
            swept(config, clock)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        return
    sides = (lambda: swept(config, clock), lambda: bare(model, scenes, strategies, clock))
    runs: tuple[list[list[float]], list[list[float]]] = ([], [])
    for step in range(given.rounds + 1):  # the first round warms up
        for which in (0, 1) if step % 2 else (1, 0):
            times = sides[which]()
            if step:
                runs[which].append(times)
    later = [[times[-1] - times[1] for times in side] for side in runs]
    first = [statistics.median(times[1] - times[0] for times in side) for side in runs]
    sweep_s, bare_s = (statistics.median(side) for side in later)
    result = {
        "sweep_s": round(sweep_s, 3),
        "bare_s": round(bare_s, 3),
        "ratio": round(sweep_s / bare_s, 3),
        "ratio_of_minima": round(min(later[0]) / min(later[1]), 3),
        "ratios": [round(one / other, 3) for one, other in zip(*later, strict=True)],
        "first_scene_more_s": round(first[0] - first[1], 3),
        "first_scene_more_in_scenes": round((first[0] - first[1]) / (bare_s / (len(scenes) - 1)), 2),
        "queries": sum(len(scene.queries) for scene in scenes),
        "strategies": len(strategies),
        "clock": given.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(text := json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
