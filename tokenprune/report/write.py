"""Everything that `compare --out` writes into a folder."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

from tokenprune.errors import InputError, PluginError
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.plugins import registry
from tokenprune.report.files import check_drawing
from tokenprune.utils.files import expanded, reason, write_first

OWN_FILES = ("results.json", "tradeoff-*.png", "overlay-*.png")


def writable_folder(path: str | Path) -> Path:
    """The folder, created if necessary, after a test that files can be written in it.

    Raises:
        InputError: it cannot be created or written.
    """
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output folder {str(folder)!r} cannot be written ({reason(error)}); choose another"
        ) from error
    return folder


def unused_folder(path: str | Path) -> Path:
    """The folder, as from `writable_folder`, after a check that it holds no other run's results.

    Raises:
        InputError: it cannot be created or written, or it holds results.
    """
    folder = writable_folder(path)
    taken = next((found for pattern in OWN_FILES for found in sorted(folder.glob(pattern))), None)
    if taken is not None:
        raise InputError(
            f"output folder {str(folder)!r} holds the results of another run ({taken.name}); choose another folder, or "
            "delete those files first"
        )
    return folder


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """results.json, tradeoff-*.png, one overlay-*.png for every kept sample and budget, and the files of plugins.

    results.json is written first. Nothing is overwritten: if the folder holds the results of another run by now, the
    files go to a new folder `run-2` (`run-3`, …) in it.

    Returns the paths.

    Raises:
        InputError: the folder, or a file in it, cannot be written; files written before stay.
        PluginError: a report section of a plugin failed; everything else is written.
        UnsupportedError: matplotlib is not installed; nothing is written.
    """
    check_drawing("writing a comparison")
    from tokenprune.report.overlays import by_budget, comparison_sheet, file_name, save
    from tokenprune.report.plots import tradeoff

    results = _write_results(comparison.to_json() + "\n", expanded(folder))
    folder, written = results.parent, [results]
    for metric in ("giou", "agreement"):
        written.append(save(tradeoff(comparison, metric), folder / f"tradeoff-{metric}.png"))
    for number, record in enumerate(comparison.records):
        for budget, part in by_budget(record).items():
            at = "" if budget is None else f"-budget-{budget:g}"
            path = folder / f"overlay-{number}-{file_name(record.query)}{at}.png"
            written.append(save(comparison_sheet(part), path))
    return written + _sections_of_plugins(comparison, folder)


def _write_results(text: str, folder: Path) -> Path:
    for number in count(1):
        path = writable_folder(folder if number == 1 else folder / f"run-{number}") / "results.json"
        if write_first(path, text):
            return path
    raise AssertionError  # a count has no end


def _sections_of_plugins(comparison: Comparison, folder: Path) -> list[Path]:
    written: list[Path] = []
    failed: PluginError | None = None
    for entry in registry.entries("report_sections").values():
        try:
            answer = entry.call(comparison, folder)
            given = answer if isinstance(answer, (list, tuple)) else [None]
            paths = [Path(path) for path in given if isinstance(path, (str, Path))]
            inside = [path for path in paths if path.resolve().is_relative_to(folder.resolve()) and path.is_file()]
            if len(inside) != len(given):
                raise entry.refusal(f"gave {answer!r}, expected a list of the files that it wrote in {str(folder)!r}")
            written += paths
        except PluginError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return written
