"""A folder of images and mask files, with a table of the queries: queries.csv or queries.jsonl."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tokenprune.datasets.files.annotation_files import words
from tokenprune.datasets.files.dataset import FileDataset, FileOptions, ListedQuery, ListedScene, Target
from tokenprune.datasets.files.query_tables import Row, rows_of
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown
from tokenprune.utils.masks import read_mask

TABLES = ("queries.csv", "queries.jsonl")
KIND = "query"  # of a table without kinds
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


class Folder(FileDataset):
    """A folder with queries.csv or queries.jsonl: one query per row.

    Columns: `image`, `mask` (paths in the folder) and `query`; if wanted `kind`, `id`, `split` and `is_sentence`.
    Masks are read by `tokenprune.utils.masks.read_mask`. Splits are the values of `split`, or "val" without the column.
    """

    name = "folder"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    kinds: ClassVar[tuple[str, ...]] = (KIND,)
    layout = f"a folder with {' or '.join(TABLES)} of columns image, mask, query"

    class Options(FileOptions):
        """Options of a folder."""

        white: Literal["target", "ignore"] = Field(
            "target", description="Meaning of 255 in mask files: the target, or (beside 1) pixels that do not count."
        )

    options: Options

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        super().__init__(path, name=name, **options)
        tables = [self.path / table for table in TABLES if os.path.isfile(self.path / table)]
        if len(tables) != 1:
            found = f"both {' and '.join(TABLES)} are in" if tables else "no table of queries is in"
            cure = "; remove one" if tables else self._expected()
            raise InputError(f"dataset {self.name!r}: {found} {str(path)!r}{cure}")
        (self.table,) = tables
        self.rows = self._rows()
        self.splits = tuple(dict.fromkeys(row.get("split", "val") for row in self.rows))  # type: ignore[misc]
        self.kinds = tuple(dict.fromkeys(row.get("kind", KIND) for row in self.rows))  # type: ignore[misc]

    def _rows(self) -> list[Row]:
        rows = rows_of(self.table)
        for row in rows:
            for column in ("split", "kind"):
                if column in row.cells and not row.get(column):
                    raise InputError(f"{row.where}: {column} is empty; give it in every row, or leave the column out")
        return rows

    def listed(self, split: str) -> Sequence[ListedScene]:
        """See `FileDataset.listed`: images in the order in which the table first names them."""
        wanted = [row for row in self.rows if row.get("split", "val") == split]
        taken: dict[str, Row] = {}
        images: dict[Path, list[tuple[ListedQuery, Path]]] = {}
        problems: list[ListedScene] = []
        for row in wanted:
            try:
                image, mask = self._place(row, "image"), self._place(row, "mask")
                known = images.setdefault(image, [])
                id = row.get("id", f"{row.get('image')}#{len(known) + 1}")
                if not id or id in taken:
                    found = f"is that of line {taken[id].line} too" if id else "is empty"
                    raise InputError(f"{row.where}: id {id!r} {found}; give each query its own")
                taken[id] = row
                known.append((self._query(row, id, mask), mask))
            except InputError as error:
                problems.append(ListedScene(f"line {row.line}", self.table, problem=str(error)))
        scenes = [
            ListedScene(
                str(image.relative_to(self.path)),
                image,
                tuple(query for query, _ in queries),
                needs=tuple(mask for _, mask in queries),
            )
            for image, queries in images.items()
            if queries
        ]
        return problems + scenes

    def _query(self, row: Row, id: str, mask: Path) -> ListedQuery:
        text = words(row.cells["query"], f"{row.where}: query")
        given = row.cells.get("is_sentence", False)
        is_sentence = given if isinstance(given, bool) else TRUTH.get(given.lower())
        if is_sentence is None:
            raise InputError(f"{row.where}: is_sentence is {shown(given)}, expected true or false")
        return ListedQuery(id, text, row.get("kind", KIND), partial(self._target, mask), is_sentence)

    def _target(self, mask: Path, height: int, width: int) -> Target:
        return Target(read_mask(mask, size=(height, width), white=self.options.white))

    def _place(self, row: Row, column: str) -> Path:
        """A file of the folder. Raises InputError for one outside, so that the folder can be moved as a whole."""
        text = row.get(column)
        if not text:
            cure = "; a query without a target has a black mask" if column == "mask" else ""
            raise InputError(f"{row.where}: {column} is empty, expected a path{cure}")
        path = Path(text)
        if path.is_absolute() or re.match(r"[A-Za-z]:[\\/]", text) or ".." in path.parts:
            raise InputError(
                f"{row.where}: {column} {shown(text)} leaves the folder; give a path in it, to a copy or a link"
            )
        return self.path / path
