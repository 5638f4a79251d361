"""Everything that `compare --out` writes into a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenprune import registry
from tokenprune.errors import InputError, PluginError
from tokenprune.evaluation.results import Comparison


def writable_folder(path: str | Path) -> Path:
    """The folder, made if it is not there, once a file could be written in it.

    Raises:
        InputError: it cannot be made or written.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise InputError(f"output folder {str(folder)!r} cannot be written ({why}); choose another") from error
    return folder


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """results.json, tradeoff-*.png, one overlay-*.png for every sample that was kept and budget, and what plugins add.

    Gives the paths.

    Raises:
        InputError: the folder cannot be written.
        PluginError: a report section of a plugin failed; all else is written then.
    """
    from tokenprune.report.overlays import by_budget, comparison_sheet, file_name, save
    from tokenprune.report.plots import tradeoff

    folder = writable_folder(folder)
    results = folder / "results.json"
    results.write_text(comparison.to_json() + "\n", encoding="utf-8")
    written = [results]
    for metric in ("giou", "agreement"):
        written.append(save(tradeoff(comparison, metric), folder / f"tradeoff-{metric}.png"))
    for number, record in enumerate(comparison.records):
        for budget, part in by_budget(record).items():
            at = "" if budget is None else f"-budget-{budget:g}"
            path = folder / f"overlay-{number}-{file_name(record.query)}{at}.png"
            written.append(save(comparison_sheet(part), path))
    return written + _sections_of_plugins(comparison, folder)


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
