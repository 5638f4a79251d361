"""Everything that `tokenprune report` writes."""

from __future__ import annotations

from pathlib import Path

from tokenprune.errors import InputError
from tokenprune.report.files import check_distinct
from tokenprune.utils.extras import check_modules
from tokenprune.utils.files import path_given, reason, replacing

SUFFIXES = (".html", ".htm")
NEEDED = ("pandas", "plotly", "jinja2")


def write_report(
    run: str | Path, out: str | Path, tables: str | Path | None = None, figures: str | Path | None = None
) -> list[Path]:
    """Write the report of a sweep; also while the sweep runs.

    Args:
        run: folder of the sweep.
        out: the HTML file, which needs no other file and no network; an existing one is replaced.
        tables: folder for the numbers as LaTeX, CSV and Markdown.
        figures: folder for figures of papers as PNG, SVG and PDF.

    Returns the paths of what was written, the page first. Folders are made if necessary.

    Raises:
        InputError: there is no such sweep, it has no record, a file cannot be written, or `out` is not named as an HTML
            file.
        UnsupportedError: pandas, plotly, jinja2, or for figures matplotlib, is not installed; nothing is written.

    Examples:
        >>> import tempfile, tokenprune as tp
        >>> from tokenprune.report import write_report
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none", "fastv"], "limit": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tp.sweep(config, folder)
        ...     paths = write_report(folder, f"{folder}/report.html", tables=f"{folder}/tables")
        >>> [path.name for path in paths]
        ['report.html', 'results.csv', 'results.md', 'results.tex']
    """
    check_installed(figures is not None)
    _check_out(out, run)
    from tokenprune.report.page.data import read_study
    from tokenprune.report.page.html import page

    study = read_study(run)
    folders = [
        None if folder is None else _folder(folder) for folder in (path_given("out", out).parent, tables, figures)
    ]
    written = [_write(page(study), path_given("out", out))]
    if folders[1] is not None:
        from tokenprune.report.tables import write_tables

        written += write_tables(study, folders[1])
    if folders[2] is not None:
        from tokenprune.report.figures import write_figures

        written += write_figures(study, folders[2])
    return written


def check_installed(figures: bool = False) -> None:
    """Check before any work that reports can be made; nothing is imported.

    Raises:
        UnsupportedError: a package is missing.
    """
    check_modules("a report", (*NEEDED, *(("matplotlib",) if figures else ())), "report")


def _check_out(out: str | Path, run: str | Path) -> None:
    from tokenprune.sweeps.store import FILE

    path, store = path_given("out", out), path_given("folder of a sweep", run) / FILE
    if path.is_dir():
        raise InputError(f"report {str(out)!r} is a folder; give the path of an HTML file, such as report.html")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"report {str(out)!r}: found suffix {path.suffix!r}, expected .html")
    check_distinct({"--out": [path]}, [store], "the store of the sweep")


def _write(text: str, path: Path) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _folder(path: str | Path) -> Path:
    folder = path_given("folder", path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be made ({reason(error)}); choose another") from error
    return folder
