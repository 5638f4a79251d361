"""Tables of queries: CSV with a header, or JSON lines, with errors that name the line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenprune.datasets.files.annotation_files import parsed, text_of
from tokenprune.errors import InputError, nearest
from tokenprune.utils.arguments import shown, unicode_problem

NEEDED = ("image", "mask", "query")
OPTIONAL = ("kind", "id", "split", "is_sentence")
COLUMNS = (*NEEDED, *OPTIONAL)
OTHER_SEPARATORS = (";", "\t")


@dataclass(frozen=True)
class Row:
    """One row: cells by column, without spaces at their ends, and where it begins."""

    file: Path
    line: int
    cells: dict[str, str | bool]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{str(self.file)!r}, line {self.line}"

    def get(self, column: str, default: str = "") -> str:
        """A cell's text."""
        return str(self.cells.get(column, default))


def rows_of(file: Path, needed: Sequence[str] = NEEDED) -> list[Row]:
    """The rows of a table, empty lines left out: of CSV, or, by its name, of JSON lines.

    Args:
        file: the table.
        needed: columns that it must have; those of `COLUMNS` are allowed.

    Raises:
        InputError: it cannot be read, is not UTF-8, has no rows, other columns, or rows of another length.
    """
    text = text_of(file)
    rows = _json_rows(file, text, needed) if file.suffix == ".jsonl" else _csv_rows(file, text, needed)
    if not rows:
        raise InputError(f"{str(file)!r} has no queries; add a row for each")
    return rows


def _csv_rows(file: Path, text: str, needed: Sequence[str]) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = Row(file, line, {}), reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_columns(where.where, header, needed)
                continue
            if len(cells) != len(header):
                found = f"{len(cells)} cells found, expected {len(header)}, as in the header"
                raise InputError(f'{where.where}: {found}; put a text with commas in quotes, as in "left, behind"')
            rows.append(Row(file, where.line, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    except csv.Error as error:
        cure = 'close each quotation mark, and double those within a text, as in "a ""red"" ring"'
        raise InputError(f"{str(file)!r}, line {line}: not CSV ({error}); {cure}") from error
    return rows


def _json_rows(file: Path, text: str, needed: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{str(file)!r}, line {number}"
        pairs = parsed(line, repr(str(file)), number, tuple)  # of a dict, the last of two values would be taken
        if not isinstance(pairs, tuple):
            raise InputError(f"{where}: {shown(pairs)} found, expected an object with {_and(needed)}")
        _check_columns(where, [column for column, _ in pairs], needed)
        found = dict(pairs)
        for column, value in found.items():
            if isinstance(value, int) and not isinstance(value, bool) and column == "id":
                found[column] = str(value)
            elif not isinstance(value, (str, bool) if column == "is_sentence" else str):
                raise InputError(f"{where}: {column} is {shown(value)}, expected text")
            elif isinstance(value, str) and (problem := unicode_problem(value)):
                raise InputError(f"{where}: {column} {value[:60]!a} {problem}")
            elif isinstance(value, str):
                found[column] = value.strip()
        rows.append(Row(file, number, found))
    _check_same(rows)
    return rows


def _check_columns(where: str, columns: list[str], needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in columns]
    separator = next((mark for mark in OTHER_SEPARATORS if len(columns) == 1 and mark in columns[0]), None)
    if separator:
        raise InputError(f"{where}: {separator!r} separates the columns, expected commas; save it with commas")
    if missing:
        found = ", ".join(map(shown, columns[:8]))
        raise InputError(f"{where}: no column {', '.join(missing)}; found {found}; name {_and(needed)} first")
    for column in columns:
        if column not in COLUMNS:
            near = nearest(column, COLUMNS)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"{where}: unknown column {shown(column)}; {hint}expected {', '.join(COLUMNS)}")
        if columns.count(column) > 1:
            raise InputError(f"{where}: column {column!r} is there {columns.count(column)} times; keep one")


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _check_same(rows: list[Row]) -> None:
    """Refuse a column that is in a part of the rows, apart from `is_sentence`, which is false where it is absent."""
    for row in rows[1:]:
        if odd := sorted((row.cells.keys() ^ rows[0].cells.keys()) - {"is_sentence"}):
            held = "has" if odd[0] in row.cells else "has no"
            raise InputError(f"{row.where} {held} {odd[0]!r}, unlike the first row; give it in all rows, or in none")
