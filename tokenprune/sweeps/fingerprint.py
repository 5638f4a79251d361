"""Digests of what results depend on: code, weights and data; a resumed sweep compares them with the stored ones."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tokenprune.core.strategy import Strategy
from tokenprune.datasets.base import Scene

SAMPLED = 64  # values of a tensor, evenly spaced
PACKAGES = ("tokenprune", "tokenprune_strategies", "tokenprune_adapters")


def of_code(strategies: list[Strategy]) -> dict[str, str]:
    """Of the source files of each package that computes, those of the strategies included."""
    names = {*PACKAGES, *(type(strategy).__module__.partition(".")[0] for strategy in strategies)}
    return {name: _of_package(name) for name in sorted(names)}


def is_changed(before: Any, now: Any) -> bool:
    """Whether digests differ; of several by package, those that both have: a strategy may come with another package."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return any(before[name] != now[name] for name in before.keys() & now.keys())
    return bool(before != now)


@cache
def _of_package(name: str) -> str:
    spec = importlib.util.find_spec(name) if name != "__main__" else None
    found = hashlib.blake2b(name.encode(), digest_size=8)
    if spec is None:
        return found.hexdigest()
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    for file in files or [Path(str(spec.origin))]:
        if file.is_file():
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def joined_digests(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of code and weights: those of now, and of the packages that were used before."""
    packages = [one["code"] for one in (before, now) if isinstance(one.get("code"), Mapping)]
    code = {name: found for one in packages for name, found in one.items()} if len(packages) == 2 else now["code"]
    return {**now, "code": code}


def of_weights(model: Any) -> str:
    """Of a model's parameters and buffers: names, shapes, and 64 values of each.

    Not of all values, which would take as long as reading the checkpoint. The device does not count. A number format
    rounds the values, so digests are compared within one format.
    """
    found = hashlib.blake2b(digest_size=8)
    state = model.state_dict() if hasattr(model, "state_dict") else model.decoder.state_dict()
    for name, value in sorted(state.items()):
        if not isinstance(value, torch.Tensor):
            continue
        flat = value.detach().flatten()
        index = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
        found.update(f"{name} {tuple(value.shape)}".encode())
        if flat.device.type != "meta":
            found.update(flat[index.to(flat.device)].cpu().float().numpy().tobytes())
    return found.hexdigest()


def of_scene(scene: Scene) -> str:
    """Of an image, and of each query about it with its target: "image:query:query". See `same_scene`."""
    parts = [_short(str(scene.image.shape).encode() + scene.image.tobytes(), 8)]
    for query in scene.queries:
        words = f"{query.text}\0{query.kind}\0{query.is_sentence}\0".encode()
        masks = b"".join(mask.astype("uint8").tobytes() for mask in (query.mask, *query.targets))
        parts.append(_short(words + masks, 4))
    return ":".join(parts)


def image_of(digest: str) -> str:
    """The part of a scene's digest that is of its image alone, equal for all seeds and limits."""
    return digest.partition(":")[0]


def same_scene(one: str, other: str) -> bool:
    """Whether digests are of one scene; a limit may have cut its queries."""
    return all(part == its for part, its in zip(one.split(":"), other.split(":"), strict=False))


def _short(data: bytes, size: int) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()
