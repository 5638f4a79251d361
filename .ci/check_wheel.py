"""Checks that an installed wheel is complete: `check_wheel.py FOLDER`, with FOLDER first on the path."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from tokenprune.plugins import registry

folder = Path(sys.argv[1]).resolve()
for package in ("tokenprune", "tokenprune_strategies", "tokenprune_adapters"):
    found = Path(import_module(package).__file__ or "").resolve()
    assert folder in found.parents, f"{package} was imported from {found}, expected {folder}"
    assert (found.parent / "py.typed").is_file(), f"{package} has no py.typed"

assert not registry.broken_plugins(), registry.broken_plugins()
names = 0
for kind in ("strategies", "adapters", "datasets", "models"):
    for entry in registry.entries(kind).values():
        thing = entry.load()
        names += 1
        if kind == "models":
            checkpoint = thing()
            assert (checkpoint / "config.json").is_file(), f"model {entry.name!r}: no config.json in {checkpoint}"
            weights = [file for pattern in ("*.safetensors", "*.bin") for file in checkpoint.glob(pattern)]
            assert weights, f"model {entry.name!r}: no weights in {checkpoint}"
assert names, "nothing is registered"
print(f"the wheel is complete: {names} registered names import")
