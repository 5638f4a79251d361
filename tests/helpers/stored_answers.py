"""Sets of answers for stores and reports; their contents are invented."""

from __future__ import annotations

from typing import Any


def answer_of(number: int, share: float = 1.0, **more: Any) -> dict[str, Any]:
    """The answer to a question, with a prefill that costs a share of the untouched model's."""
    found = {
        "sample": str(number),
        "text": "Is it red?",
        "answer": "yes" if number % 3 else "no",
        "target": "yes",
        "image_tokens": 64,
        "other_tokens": 12,
        "equivalent_tokens": 64 * share,
        "layers": [64, int(64 * share)],
        "flops": 1e9 * share + number,
        "flops_by_part": {"decoder": 1e9 * share + number},
        "flops_unpruned": 1e9 + number,
        "kv_bytes": 1e5 * share,
        "metrics": {"exact_match": float(number % 3 > 0), "box": {"pred": [0.0, 0.0, 0.5, 1.0]}},
    }
    return {**found, **more}


def set_of(strategy: str = "none", budget: float | None = None, count: int = 6, **more: Any) -> dict[str, Any]:
    """The answers of a strategy at a budget."""
    found = {
        "model": "some-model",
        "dataset": "questions",
        "split": "val",
        "protocol": "an-evaluator",
        "strategy": strategy,
        "label": strategy if budget is None else f"{strategy} at {budget:g}",
        "budget": budget,
        "run": "first",
        "environment": {"evaluator": "1.0"},
        "scores": {"accuracy": {"value": 0.75 * (budget or 1.0), "stderr": 0.05}, "total": {"value": 1512.25}},
        "answers": [answer_of(number, budget or 1.0) for number in range(count)],
    }
    return {**found, **more}


def sets_of(**more: Any) -> list[dict[str, Any]]:
    """The untouched model, and two strategies at two budgets."""
    pruned = [set_of(name, budget, **more) for name in ("fastv", "visionzip") for budget in (0.5, 0.25)]
    return [set_of(**more), *pruned]
