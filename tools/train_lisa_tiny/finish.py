"""The last phase: export the model, load it as a user does, measure it, and write training.json beside the weights."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from export import export
from finetune import STAGES, load_prompts
from model import build_sam
from student import TAP_WEIGHTS, TAPS, Student

import tokenprune
from tokenprune.datasets.shapes import Shapes

MEASURED = {"val": 600, "test": 600, "heldout": 300}


def finish(work: Path, out: Path, command: str) -> None:
    """Export the newest decoder checkpoint of `work` to `out` and measure it there."""
    newest = next(work / name for name in ("masks.pt", "decoder.pt") if (work / name).exists())
    parts = torch.load(newest, weights_only=True)["parts"]
    _, vocabulary = load_prompts(work)
    student, sam = Student(vocabulary), build_sam()
    student.load_state_dict(parts["student"])
    sam.load_state_dict(
        parts["sam"] if "sam" in parts else torch.load(work / "sam.pt", weights_only=True)["parts"]["sam"]
    )
    export(student, sam, work / "tokenizer", out)
    report = {
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "config": {
            "pointer_layers": dict(zip(map(str, TAPS), TAP_WEIGHTS, strict=True)),
            "curriculum": [{"until": end, **vars(stage)} for end, stage in STAGES],
            "parameters": {
                "decoder": _count(student.decoder),
                "vision_tower": _count(student.tower),
                "sam": _count(sam),
            },
        },
        "phases": _phases(work / "log.jsonl"),
        "metrics": measure(out),
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def measure(folder: Path) -> dict[str, Any]:
    """gIoU and cIoU by split and kind of the exported checkpoint, "full" and "blind" (no image token)."""
    model = tokenprune.load(str(folder), vision_tower=str(folder / "vision_tower"))
    results: dict[str, Any] = {}
    for split, limit in MEASURED.items():
        results[split] = {"queries": limit}
        for name, strategy in (("full", None), ("blind", tokenprune.strategy("blind"))):
            found: dict[str, list[tuple[int, int]]] = defaultdict(list)
            for scene in Shapes().scenes(split, limit):
                answer = model.segment(scene.image, [query.text for query in scene.queries], strategy=strategy)
                for query, mask in zip(scene.queries, np.asarray(answer.masks), strict=True):
                    pair = (int((mask & query.mask).sum()), int((mask | query.mask).sum()))
                    found[query.kind].append(pair)
                    found["all"].append(pair)
            results[split][name] = {kind: _scores(pairs) for kind, pairs in found.items()}
            print(split, name, results[split][name], flush=True)
    return results


def _scores(pairs: list[tuple[int, int]]) -> dict[str, float]:
    overlap, union = np.array(pairs, dtype=np.float64).T
    return {
        "giou": round(float((overlap / (union + 1e-5)).mean()), 4),
        "ciou": round(float(overlap.sum() / union.sum()), 4),
        "queries": len(pairs),
    }


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _phases(log: Path) -> dict[str, Any]:
    """For each phase the last averages of its losses and every evaluation on 320 queries of val."""
    phases: dict[str, Any] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        phase = phases.setdefault(record.pop("phase"), {"last": {}, "evaluations": []})
        if "giou" in record:
            phase["evaluations"].append(record)
        else:
            phase["last"] = record
    return phases
