"""Requests per second of `tokenprune serve`: waiting requests in batches against one at a time, by number of clients.

Server and clients are in one process, on loopback; each client sends its next request when it has its answer. "one
picture" asks every question about the same picture, which the model remembers after the towers; otherwise each request
has a picture of its own. Both ways run in turn in every round, and every mask is compared with that of `segment` by
itself.

    python benchmarks/served.py [--model lisa-tiny] [--clients 1 4 16] [--requests 48] [--rounds 3] [--json served.json]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image
from pycocotools import mask as coco
from random_lisa import SHAPES, random_lisa
from rich.console import Console
from rich.table import Table

import tokenprune as tp
from tokenprune.evaluation.environment import describe
from tokenprune.serve.limits import Limits
from tokenprune.serve.server import config_of
from tokenprune.utils.sockets import opened, url_of

QUERIES = ("the red ring", "the star", "the large blue thing", "the cross left of the circle", "the small square")
PIXELS = (240, 320)  # of a picture
SECONDS = 600  # that a client waits
Request = tuple[bytes, str]


@contextmanager
def served(model: Any, largest_batch: int) -> Iterator[str]:
    """The address of a server."""
    listening = opened("127.0.0.1", 0)
    running = uvicorn.Server(config_of(model, limits=Limits(queue=1000, batch=largest_batch, seconds=SECONDS)))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.05)
    try:
        yield url_of(listening)
    finally:
        running.should_exit = True
        thread.join()


def requests_of(number: int, pictures: int, seed: int = 0) -> list[Request]:
    """PNG files of smooth noise, and queries of several lengths."""
    files = []
    for picture in range(pictures):
        small = np.random.default_rng([seed, picture]).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize(PIXELS[::-1], Image.Resampling.BICUBIC).save(file, "PNG")
        files.append(file.getvalue())
    return [(files[place % pictures], QUERIES[place % len(QUERIES)]) for place in range(number)]


def alone(model: Any, requests: Sequence[Request], strategy: tp.Strategy | None) -> list[np.ndarray[Any, Any]]:
    """The mask of each request by itself."""
    images = [Image.open(io.BytesIO(file)) for file, _ in requests]
    pairs = zip(images, requests, strict=True)
    return [model.segment(image, query, strategy).masks[0].cpu().numpy() for image, (_, query) in pairs]


def ask(address: str, requests: Sequence[Request], clients: int, fields: dict[str, str]) -> tuple[float, list[Any]]:
    """Seconds until every request has its answer, and the masks."""

    def post(request: Request) -> np.ndarray[Any, Any]:
        file, query = request
        answer = client.post(f"{address}/segment", files={"image": file}, data={"query": query, **fields})
        answer.raise_for_status()
        return np.asarray(coco.decode(answer.json()["mask"]), dtype=bool)

    with httpx.Client(timeout=SECONDS) as client, ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        masks = list(pool.map(post, requests))
        return time.perf_counter() - start, masks


def same(found: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
    """How many masks are equal, and the smallest share of equal pixels of any."""
    shares = [float((one == other).mean()) for one, other in zip(found, wanted, strict=True)]
    return {"equal_masks": sum(share == 1 for share in shares) / len(shares), "least_equal_pixels": min(shares)}


def measure(
    ways: dict[str, str], model: Any, case: dict[str, Any], given: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Every way with every number of clients, in turn in every round, after one that is not counted."""
    fields = {} if given.strategy == "none" else {"strategy": given.strategy, "budget": str(given.budget)}
    strategy = tp.strategy(given.strategy, budget=given.budget) if fields else None
    requests = requests_of(given.requests, case["pictures"])
    wanted = alone(model, requests, strategy)
    seconds: dict[tuple[str, int], list[float]] = {(way, clients): [] for clients in given.clients for way in ways}
    agreed: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in seconds}
    for number in range(given.rounds + 1):
        for way, clients in seconds if number % 2 else reversed(seconds):
            model.image_cache.clear()
            taken, masks = ask(ways[way], requests, clients, fields)
            agreed[way, clients].append(same(masks, wanted))
            console.print(f"round {number}, {case['name']}, {clients} clients, {way}: {taken:.2f} s", style="dim")
            if number:
                seconds[way, clients].append(taken)
    first = next(iter(ways))
    found = []
    for (way, clients), taken in seconds.items():
        ratios = [base / one for base, one in zip(seconds[first, clients], taken, strict=True)]
        worst = {name: min(one[name] for one in agreed[way, clients]) for name in agreed[way, clients][0]}
        rate = len(requests) / statistics.median(taken)
        found.append(
            {**case, "clients": clients, "way": way, "requests_per_second": rate, "seconds": taken, "ratios": ratios}
            | worst
        )
        if worst["least_equal_pixels"] < given.least_equal:
            sys.exit(f"{way}, {clients} clients: a mask differs from the single one: {worst}")
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lisa-tiny", help=f"of tokenprune.load, or random: {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of a random model")
    parser.add_argument("--strategy", default="none")
    parser.add_argument("--budget", type=float, default=0.35)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48, help="of all clients together")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--least-equal", type=float, default=0.999, help="share of a mask's pixels that have to agree")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.model in SHAPES:
        model: Any = random_lisa(SHAPES[given.model], getattr(torch, given.dtype), given.device)
    else:
        model = tp.load(given.model, device=given.device)
    console = Console(stderr=True)
    cases = [{"name": "own pictures", "pictures": given.requests}, {"name": "one picture", "pictures": 1}]
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sizes = {"one at a time": 1, f"batches of {given.batch}": given.batch}
        ways = {way: stack.enter_context(served(model, size)) for way, size in sizes.items()}
        for case in cases:
            results += measure(ways, model, case, given, console)
    table = Table("", "clients", "way", "requests/s", "× one at a time (spread)", "equal masks", "least equal pixels")
    for row in results:
        ratios = row["ratios"]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        equal, least = f"{row['equal_masks']:.1%}", f"{row['least_equal_pixels']:.4%}"
        table.add_row(
            row["name"], str(row["clients"]), row["way"], f"{row['requests_per_second']:.2f}", spread, equal, least
        )
    Console(width=120).print(table)
    names = ("model", "strategy", "budget", "requests", "batch", "rounds")
    about = {**{name: getattr(given, name) for name in names}, **describe(model.decoder)}
    if given.json:
        given.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
