"""Images per second: one image at a time against `segment_many`, and which of its parts gives what.

All ways run in turn within one process, on the same files, so that drift of the machine hits them alike; masks are
checked to agree before anything is timed. "read ahead" is a batch size of 1, "batches" also runs towers and decoder on
several images, "bool masks" are what both return without logits, "low" leaves masks at the mask head's size.

    python benchmarks/many_images.py [--model lisa-tiny] [--images 16] [--rounds 5] [--json many.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, SamConfig, SamModel

import tokenprune as tp
from tokenprune_adapters.clip.tower import ClipPixels

QUERY = "the red ring left of the star"
STRATEGIES: dict[str, dict[str, Any]] = {"none": {}, "csp": {"budget": 0.35}}


def photographs(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """JPEG files of smooth noise, which take as long to read as photographs of the size."""
    paths = []
    for seed in range(count):
        small = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        path = folder / f"{seed}.jpg"
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=92)
        paths.append(path)
    return paths


def larger() -> Any:
    """lisa-tiny's code with random parts of other sizes: CLIP at 336 pixels, SAM at 512, a decoder of width 512."""
    torch.manual_seed(0)
    model: Any = tp.load("lisa-tiny")
    clip = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, image_size=336
    )
    clip.patch_size = 14
    rows = model.decoder.get_input_embeddings().num_embeddings
    decoder = LlamaConfig(
        vocab_size=rows, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    sam = SamConfig(
        vision_config={
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": 512,
            "window_size": 8,
            "global_attn_indexes": [2, 5],
            "mlp_dim": 768,
        },
        prompt_encoder_config={"image_size": 512},
    )
    model.tower = CLIPVisionModel(clip).eval()
    model.tower_layers = 8
    model.projector = nn.Linear(256, 512)
    model.decoder = LlamaForCausalLM(decoder).eval()
    model.mask_projection = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256))
    model.sam = SamModel(sam).eval()
    model.clip_pixels = ClipPixels(Path("/nowhere"), model.tower)
    model.clip_space = None
    return model


def ways(model: Any, paths: list[Path], strategy: tp.Strategy | None, batch: int) -> dict[str, Callable[[], list[Any]]]:
    """Each returns the masks of all images."""

    def many(batch_size: int, **options: Any) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            found = model.segment_many(((path, QUERY) for path in paths), strategy, batch_size=batch_size, **options)
            return [done.result.masks for done in found]

        return run

    return {
        "one at a time": lambda: [model.segment(path, QUERY, strategy).masks for path in paths],
        "read ahead": many(1),
        f"batches of {batch}": many(batch),
        f"batches of {batch}, low": many(batch, mask_size="low"),
    }


def measured(
    calls: dict[str, Callable[[], list[Any]]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every call, in turn."""
    wanted = None
    for name, call in calls.items():  # also warms up
        masks = call()
        wanted = masks if wanted is None else wanted
        agree = [float((a == b).float().mean()) for a, b in zip(masks, wanted, strict=True) if a.shape == b.shape]
        assert name.endswith("low") or min(agree) > 0.9999, f"{name}: masks differ"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items() if number % 2 else reversed(calls.items()):
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lisa-tiny", help="of tokenprune.load, or 'larger' for random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(1200, 1600), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of all threads, which shows no overlap, only work saved"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    clock = time.process_time if given.cpu_time else time.perf_counter

    model = larger() if given.model == "larger" else tp.load(given.model)
    model.to(given.device)
    table = Table("strategy", "way", "images/s", "× one at a time", "× by minima")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder), given.images, *given.size)
        for name, options in STRATEGIES.items():
            seconds = measured(ways(model, paths, tp.strategy(name, **options), given.batch), given.rounds, clock)
            first = next(iter(seconds.values()))
            for way, taken in seconds.items():
                # ratios of runs of the same round, which share the state of the machine
                ratio = statistics.median(one / other for one, other in zip(first, taken, strict=True))
                least = min(first) / min(taken)
                rate = len(paths) / statistics.median(taken)
                table.add_row(name, way, f"{rate:.2f}", f"{ratio:.2f}", f"{least:.2f}")
                results.append(
                    {"strategy": name, "way": way, "images_per_second": rate, "ratio": ratio, "least": least}
                )
    Console(width=100).print(table)
    about = {
        "model": given.model,
        "device": given.device,
        "clock": clock.__name__,
        "size": list(given.size),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(about))
    if given.json:
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
