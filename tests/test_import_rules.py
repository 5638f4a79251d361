"""What built-in strategies and adapters import of the package's public names, which import-linter cannot see.

`from tokenprune import prune` is an import of `tokenprune` to the linter, since public names are imported on first use.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tokenprune

ROOT = Path(__file__).parents[1]
BELOW = ("tokenprune.core.", "tokenprune.plugins.", "tokenprune.utils.", "tokenprune.errors")
ALLOWED = {
    "strategies/tokenprune_strategies": BELOW,
    "adapters/tokenprune_adapters": (*BELOW, "tokenprune.engine", "tokenprune.loading.", "tokenprune.api"),
}


def imported(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "tokenprune"]
    return [name.name for node in found for name in node.names]


@pytest.mark.parametrize("folder", ALLOWED)
def test_public_names_come_from_the_layers_below(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = {(path.name, name) for path in paths for name in imported(path)}
    assert len(paths) > 10
    for path, name in sorted(names):
        home = tokenprune._MODULE_OF.get(name, f"tokenprune.{name}.")
        assert f"{home}.".startswith(ALLOWED[folder]), f"{folder}/{path} imports {name} from {home}"
