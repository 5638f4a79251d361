"""The tables over models, of stored sweeps made by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

TOOLS = str(Path(__file__).parents[2] / "tools" / "figures")


def stored(gious: dict[str, float], orders: list[list[Any]], renumbering: float) -> dict[str, Any]:
    """A stored sweep at 0.35: gIoU by strategy, and what renumbering changes in all of them."""
    rows: list[dict[str, Any]] = [{"strategy": "none", "given": {}, "budget": None, "positions": None}]
    rows[0] |= {"giou": [0.9, 0.8, 1.0], "against_other_policy": None}
    for name, value in gious.items():
        for policy in ("keep", "renumber"):
            change = {"value": [renumbering, 0, 0], "shown": renumbering != 0} if policy == "renumber" else None
            rows.append({"strategy": name, "given": {"positions": policy}, "budget": 0.35, "positions": policy})
            rows[-1] |= {"giou": [value, value - 0.1, value + 0.1], "against_other_policy": change}
    return {"rows": rows, "orders": orders, "pairs": []}


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(TOOLS)
    module = import_module("evidence")
    monkeypatch.setattr(module, "EVIDENCE", tmp_path)
    module.models.cache_clear()
    first = [[0.35, "a", "b", 0.2, True], [0.35, "a", "c", 0.3, True], [0.35, "b", "c", 0.1, True]]
    second = [[0.35, "b", "a", -0.1, True], [0.35, "a", "c", 0.1, False], [0.35, "b", "c", -0.2, True]]
    files = {
        "lisa-tiny": stored({"a": 0.7, "b": 0.5, "c": 0.4}, first, -0.25),
        "photo-small": stored({"a": 0.6, "b": 0.4, "c": 0.5}, second, 0.0),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    yield module
    module.models.cache_clear()
    for name in ("evidence", "sweep_tables"):
        sys.modules.pop(name, None)


def test_orders_that_hold_in_every_model(evidence: Any) -> None:
    """a is above b in both, whichever is named first; b and c are opposed; a and c are shown in one alone."""
    assert evidence.signs() == {("a", "b"): [1, 1], ("a", "c"): [1, 0], ("b", "c"): [1, -1]}
    assert "| `a` | `b` |  |" in evidence.orders()
    assert "| `b` |  | `a` |" in evidence.orders()
    assert "| 0.35 | 3 | 1 | 1 | 1 |" in evidence.counts()
    assert "| `b`, `c` | `b` | `c` |" in evidence.opposed()


def test_a_method_that_did_not_run_in_a_model_has_no_order(evidence: Any, tmp_path: Path) -> None:
    file = tmp_path / "photo-small.json"
    content = json.loads(file.read_text())
    content["orders"] = content["orders"][:1]
    content["rows"] = [row for row in content["rows"] if row["strategy"] != "c"]
    file.write_text(json.dumps(content))
    assert evidence.signs() == {("a", "b"): [1, 1]}
    assert "| `c` | 0.400 [0.300, 0.500] | – |" in evidence.everywhere()


def test_accuracies_side_by_side_and_what_renumbering_costs(evidence: Any) -> None:
    lines = evidence.everywhere().splitlines()
    assert lines[0] == "| strategy | `lisa-tiny` | `photo-small` |"
    assert lines[2].startswith("| `none` |")
    assert lines[3] == "| `a` | **0.700** [0.600, 0.800] | **0.600** [0.500, 0.700] |"
    assert "| median | **-0.250** | **+0.000** |" in evidence.renumbered()
    assert "| `a` | -0.250 | (+0.000) |" in evidence.renumbered()
    assert "| `lisa-tiny`, `photo-small` | 3 | 0.33 |" in evidence.likeness()
