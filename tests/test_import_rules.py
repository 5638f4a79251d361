"""What built-in strategies and adapters import of the package's public names, which import-linter cannot see.

`from tokenprune import prune` is an import of `tokenprune` to the linter, since public names are imported on first use.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tokenprune

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenprune", "tokenprune_strategies", "tokenprune_adapters")
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


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count, those for annotations alone do not."""
    grimp = pytest.importorskip("grimp", reason="import-linter, which brings it, is not installed")
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in graph.find_modules_directly_imported_by(module):
                walk(imported, (*path, module))
            done.add(module)

    for module in sorted(graph.modules):
        walk(module, ())
