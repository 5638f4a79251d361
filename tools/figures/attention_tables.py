"""The table of `docs/attention.md`, of what `attention.py measure` stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sweep_tables import table

STORED = Path(__file__).resolve().parents[2] / "docs" / "results"
SHOWN = ("attention-lisa-tiny",)  # columns of the table and of the figures
LINES = (
    ("mask_query", "first", "on the first token"),
    ("mask_query", "before", "on other text before the image"),
    ("mask_query", "image", "on the image"),
    ("mask_query", "behind", "on text behind the image"),
    ("mask_query", "target", "on the target, times an even share"),
    ("last", "target", "… of the last token"),
    ("text", "target", "… of the text behind the image"),
    ("mask_query", "auc", "AUC, mean of the heads"),
    ("mask_query", "auc_best_head", "AUC, best head"),
    ("mask_query", "auc_other_queries", "AUC, other queries about the picture"),
    ("mask_query", "auc_other_scenes", "AUC, other pictures"),
    ("last", "auc", "AUC, last token"),
    ("mask_query", "top_tenth", "on the top tenth of the image (even: 0.1)"),
    ("mask_query", "entropy", "entropy (even: 1)"),
    ("mask_query", "last_quarter", "on the last quarter (even: 0.25)"),
    ("mask_query", "recency", "correlation with the position"),
)


def read(name: str) -> dict[str, Any]:
    """A stored measurement."""
    found: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def attention() -> str:
    """A column for each model: mean over its layers, and the least and greatest layer's value."""
    models = [read(name) for name in SHOWN]
    return table(
        ("", *(f"`{found['model']}`, {found['dataset']}" for found in models)),
        [(label, *(over_layers(found["rows"][row].get(measure)) for found in models)) for row, measure, label in LINES],
    )


def over_layers(values: list[list[float]] | None) -> str:
    """As in "0.95 (0.75 in layer 1, 1.00 in layer 9)"."""
    if values is None:
        return ""
    means = [value for value, _, _ in values]
    low, high = means.index(min(means)), means.index(max(means))
    mean = round(sum(means) / len(means), 2) + 0.0  # no −0.00
    return f"{mean:.2f} ({means[low]:.2f} in {low} – {means[high]:.2f} in {high})"
