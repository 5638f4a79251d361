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
from common import Recipe
from evaluate import by_form_and_kind, held_out_queries
from export import export
from finetune import STAGES, load_prompts
from model import build_sam
from student import ANCHOR_TAP, TAP_WEIGHTS, TAPS, Student

import tokenprune
from tokenprune.datasets.shapes import Shapes, Shapes2

MEASURED = {"val": 600, "test": 600, "heldout": 300}
FORM_SCENES = 400  # of test, for the scores by form


def finish(recipe: Recipe, out: Path, command: str) -> None:
    """Export the newest decoder checkpoint of the run to `out` and measure it there."""
    work = recipe.work
    newest = next(work / name for name in ("masks.pt", "decoder.pt") if (work / name).exists())
    parts = torch.load(newest, weights_only=True)["parts"]
    _, vocabulary = load_prompts(work)
    student, sam = Student(vocabulary, recipe.taught), build_sam()
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
            "seed": recipe.seed,
            "taught_heads": list(recipe.taught),
            "anchor_pointer_layer": ANCHOR_TAP,
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
        "forms": measure_forms(out),
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def load(folder: Path) -> Any:
    """The exported model, as a user loads it."""
    return tokenprune.load(str(folder), vision_tower=str(folder / "vision_tower"))


def measure(folder: Path) -> dict[str, Any]:
    """gIoU and cIoU by dataset, split and kind of the exported checkpoint, "full" and "blind" (no image token)."""
    model = load(folder)
    results: dict[str, Any] = {}
    for data, split in [*((Shapes2(), split) for split in MEASURED), (Shapes(), "test")]:
        result = results.setdefault(data.name, {}).setdefault(split, {"queries": MEASURED[split]})
        for name, strategy in (("full", None), ("blind", tokenprune.strategy("blind"))):
            found: dict[str, list[tuple[int, int]]] = defaultdict(list)
            for scene in data.scenes(split, MEASURED[split]):
                answer = model.segment(scene.image, [query.text for query in scene.queries], strategy=strategy)
                for query, mask in zip(scene.queries, np.asarray(answer.masks), strict=True):
                    pair = (int((mask & query.mask).sum()), int((mask | query.mask).sum()))
                    found[query.kind].append(pair)
                    found["all"].append(pair)
            result[name] = {kind: _scores(pairs) for kind, pairs in found.items()}
            print(data.name, split, name, result[name], flush=True)
    return results


def measure_forms(folder: Path) -> dict[str, Any]:
    """gIoU by form on held-out scenes of test, every form alone, and how many queries each has."""
    model = load(folder)
    found: dict[str, list[float]] = defaultdict(list)
    for scene, queries in held_out_queries("test", FORM_SCENES):
        masks = np.asarray(model.segment(scene.image, [text for _, text, _ in queries]).masks)
        for (form, _, item), mask in zip(queries, masks, strict=True):
            target = scene.labels == item.label
            found[form].append(float((mask & target).sum() / ((mask | target).sum() + 1e-5)))
    return {"giou": by_form_and_kind(found), "queries": {form: len(scores) for form, scores in found.items()}}


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
    """For each phase the last averages of its losses and every evaluation; a resumed run has repeated some steps."""
    phases: dict[str, Any] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        phase = phases.setdefault(record.pop("phase"), {"last": {}, "evaluations": {}})
        if "giou" in record:
            phase["evaluations"][record["step"]] = record
        elif "stopped" not in record:
            phase["last"] = record
    return {name: {**phase, "evaluations": list(phase["evaluations"].values())} for name, phase in phases.items()}
