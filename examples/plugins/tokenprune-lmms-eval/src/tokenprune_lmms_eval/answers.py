"""What lmms-eval wrote with `--log_samples`, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from tokenprune.errors import InputError
from tokenprune.sweeps.answers import Answer, AnswerSet, checked_set
from tokenprune.utils.arguments import listed
from tokenprune.utils.files import path_given, reason
from tokenprune_lmms_eval.records import KEY

# Of a sample, in lmms-eval's file; all else that it holds there are metrics.
NO_METRIC = {
    *("doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media"),
    *("resps", "filtered_resps", "token_counts"),
}
UNKNOWN = "unknown@unknown"  # lmms-eval's version of itself, where it was not installed from a repository


def read_logs(logs: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """A row for each answer. Columns that are also `tokenprune.read_results`'s have its names: `model, dataset, split,
    protocol, strategy, label, given, budget, sample, text, image_tokens, equivalent_tokens, layers, flops,
    flops_by_part, kv_bytes, metrics`; `dataset` is the task. Further ones are `run` (what the names of lmms-eval's
    files begin with), `answer`, `target`, `ran`, `other_tokens` and `flops_unpruned`.

    Args:
        logs: folders that were given as --output_path, or files of samples.

    Raises:
        InputError: a file that cannot be read, an answer without a record, or none with one.
    """
    return pd.DataFrame(_all_rows(logs))


def answer_sets(logs: str | Path | Iterable[str | Path]) -> list[AnswerSet]:
    """The answers of each run and task with lmms-eval's scores, for `tokenprune.sweeps.answers.store_answers`.

    A task with several filters has an answer by each of them; the first one counts, and the scores of all. What is not
    a finite number counts as not given.

    Args:
        logs: folders that were given as --output_path, or files of samples.

    Raises:
        InputError: as `read_logs`.
    """
    sets = []
    for (run, task), rows in groupby(_all_rows(logs), lambda row: (row["run"], row["dataset"])):
        answers: dict[str, dict[str, Any]] = {}
        for row in rows:
            answers.setdefault(row["sample"], row)
        first, results = next(iter(answers.values())), _results(run)
        higher = results.get("higher_is_better", {}).get(task, {})
        scores = {
            metric: {
                "value": value,
                "stderr": error,
                "higher_is_better": higher.get(metric.partition(",")[0]) is not False,
            }
            for metric, (value, error) in _scores(run, task).items()
        }
        known = {name: first[name] for name in ("model", "dataset", "split", "protocol", "strategy", "label", "budget")}
        found = {
            **known,
            "given": json.loads(first["given"]),
            "run": Path(run).name,
            "environment": _environment(results),
            "scores": scores,
            "answers": [_answer(row) for row in answers.values()],
        }
        sets.append(checked_set(found, f"{run}, {task}"))
    return sets


def _environment(results: dict[str, Any]) -> dict[str, Any]:
    """What lmms-eval tells of its version, its model class and where that ran."""
    config, version = results.get("config", {}), results.get("lmms_eval_version")
    found = {"lmms-eval": None if version == UNKNOWN else version}
    found |= {name: config.get(name) for name in ("model", "batch_size", "device")}
    return {name: value for name, value in found.items() if isinstance(value, (str, int))}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the store takes it: texts, and finite numbers."""
    found = {name: _finite(row[name]) for name in Answer.model_fields if name in row}
    for name in ("text", "answer", "target", "ran"):
        value = found.get(name)
        found[name] = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def _finite(value: Any) -> Any:
    """Plain data with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def _all_rows(logs: Any) -> list[dict[str, Any]]:
    rows = [row for path in _sample_files(logs) for row in _rows(path)]
    if not rows:
        raise InputError(
            f"{_shown(logs)}: no samples with records of tokenprune; run lmms-eval with --model tokenprune_…, "
            "--log_samples and --output_path, and give that path"
        )
    return rows


def summarized(answers: pd.DataFrame) -> pd.DataFrame:
    """A row for each run, task and metric: lmms-eval's own score beside means of tokens and FLOPs.

    Args:
        answers: of `read_logs`; lmms-eval's files are still where they were.

    Raises:
        InputError: a file of results that cannot be read.
    """
    rows = []
    for (run, task), group in answers.groupby(["run", "dataset"], sort=True):
        first = group.iloc[0]
        means = {
            "answers": len(group),
            "image_tokens": group.image_tokens.mean(),
            "equivalent_tokens": group.equivalent_tokens.mean(),
            "flops": group.flops.sum() / group.flops_unpruned.sum() if group.flops.notna().all() else float("nan"),
        }
        known = {"model": first.model, "dataset": task, "label": first.label, "run": run}
        for metric, (score, error) in (_scores(run, task) or {"": (None, None)}).items():
            rows.append({**known, "metric": metric, "score": score, "stderr": error, **means})
    return pd.DataFrame(rows)


def _sample_files(logs: str | Path | Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for given in listed(logs):
        path = path_given("logs", given)
        if not path.exists():
            raise InputError(f"{str(path)!r}: no such file or folder; give lmms-eval's --output_path")
        found += sorted(path.rglob("*_samples_*.jsonl")) if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def _shown(logs: Any) -> str:
    return ", ".join(repr(str(one)) for one in listed(logs))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    samples = [_read(path, line) for line in _text(path).splitlines() if line.strip()]
    records = [_record(sample) for sample in samples]
    if not any(records):
        return  # of a run without this plugin
    name, _, task = path.stem.partition("_samples_")
    run = str(path.with_name(name))
    results = _results(run)
    model, split = results.get("model_name", ""), results.get("configs", {}).get(task, {}).get("test_split")
    labels = {record["label"] for record in records if record is not None}
    if len(labels) > 1:
        raise InputError(
            f"{path}: answers of several runs ({', '.join(sorted(labels))}), which began in the same second; run them "
            "again with an --output_path for each"
        )
    for sample, record in zip(samples, records, strict=True):
        if record is None:
            raise InputError(
                f"{path}: sample {sample.get('doc_id')} has no record of tokenprune, as answers of lmms-eval's cache; "
                "run it again without --use_cache"
            )
        yield {
            "model": model,
            "dataset": task,
            "split": split or "",
            "protocol": "lmms-eval",
            "run": run,
            "sample": str(sample["doc_id"]),
            "text": sample.get("input"),
            "answer": sample.get("filtered_resps"),
            "target": sample.get("target"),
            "metrics": {name: value for name, value in sample.items() if name not in NO_METRIC},
            **{**record, "given": json.dumps(record["given"])},
        }


def _record(sample: dict[str, Any]) -> dict[str, Any] | None:
    counts = (sample.get("token_counts") or [None])[0]
    return None if counts is None else counts.get(KEY)


def _scores(run: str, task: str) -> dict[str, tuple[float, float | None]]:
    """lmms-eval's score and its standard error, by metric; empty if it wrote none."""
    found = _results(run).get("results", {}).get(task, {})
    scores = {}
    for name, value in found.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")) and _is_number(value):
            error = found.get(f"{metric}_stderr,{filtered}")
            scores[metric if filtered == "none" else name] = (value, error if _is_number(error) else None)
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _results(run: str) -> dict[str, Any]:
    """lmms-eval's file of results beside those of samples."""
    results = Path(f"{run}_results.json")
    found: dict[str, Any] = _read(results, _text(results))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is no UTF-8"
        raise InputError(f"{path} cannot be read ({why}); give lmms-eval's --output_path") from None


def _read(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not a file of lmms-eval ({error}); run it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a file of lmms-eval: an object was expected; give its --output_path")
    return found
