"""A strategy file reads like its paper: short, with the paper's address, and named tensors instead of long tuples."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import tokenprune_strategies
from tokenprune.plugins import registry

FOLDER = Path(next(iter(tokenprune_strategies.__path__)))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def files() -> set[Path]:
    """The files of the registered strategies' classes."""
    modules = {entry.load().__module__ for entry in registry.strategies().values()}
    own = [module for module in modules if module.startswith("tokenprune_strategies.")]
    return {FOLDER.parent / f"{module.replace('.', '/')}.py" for module in own}


def test_fastv_has_at_most_40_lines_and_the_median_file_90() -> None:
    assert lines(FOLDER / "fastv.py") <= 40
    assert median(lines(path) for path in files() if path.name != "presets.py") <= 90


def test_every_paper_is_linked() -> None:
    for path in files() - {FOLDER / "baselines.py", FOLDER / "csp" / "presets.py"}:
        assert "https://arxiv.org/abs/" in path.read_text(encoding="utf-8"), path


def test_no_function_gives_three_tensors_by_place() -> None:
    bare = re.compile(r"-> tuple\[(Tensor, Tensor, Tensor|Tensor, \.\.\.)")
    for path in FOLDER.rglob("*.py"):
        assert not bare.search(path.read_text(encoding="utf-8")), path
