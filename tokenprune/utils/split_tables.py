"""Tables that are split into parts on narrow terminals: each repeats the first column, and no cell is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

NARROW = 72  # columns of a terminal below which space goes before air
LEAST = 8  # columns that are left to the names in any case


@dataclass(frozen=True)
class Column:
    """A heading and its cells."""

    head: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        """The width that it needs."""
        return max(map(cell_len, (self.head, *self.cells)))


@dataclass(frozen=True)
class Parted:
    """A table in as many parts as the width requires. Every part begins with the names; numbers are never cut.

    Attributes:
        title: above the table; `justify` places it if there is one part.
        names: the first column; if it is too wide, it breaks between words.
        beside: columns after the names in every part, if there is space.
        tight_names: a replacement of the names and those columns if there is not.
        groups: all other columns, each group with a caption. If they do not fit side by side, each group begins a new
            part, and is split further if it is too wide.
    """

    title: str
    names: Column
    groups: Sequence[tuple[Sequence[Column], str]]
    beside: Sequence[Column] = field(default=())
    tight_names: Column | None = None
    justify: Literal["center", "left"] = "center"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for group, _ in self.groups for column in group]
        if not columns:
            return
        natural = self._part(columns, self.names.width, False)
        if _least(natural, console, options) <= options.max_width:
            natural.title, natural.title_justify = escape(self.title), self.justify
            natural.caption = " ".join(text for _, text in self.groups if text) or None
            yield natural
            return
        yield Text(self.title, style="table.title")
        tight = options.max_width < NARROW
        narrowed = replace(self, names=self.tight_names, beside=()) if tight and self.tight_names else self
        yield from narrowed._parts(tight, console, options)

    def _parts(self, tight: bool, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for group, _ in self.groups for column in group]
        words = max(
            (cell_len(word) for text in (self.names.head, *self.names.cells) for word in text.split()), default=1
        )
        widest = max(columns, key=lambda column: column.width)
        excess = _least(self._part([widest], words, tight), console, options) - options.max_width
        name = max(words - max(excess, 0), min(words, LEAST))
        for group, text in self.groups:
            left = list(group)
            while left:
                count = len(left)
                while count > 1 and self._is_too_wide(left[:count], name, tight, console, options):
                    count -= 1
                yield self._part(left[:count], name, tight)
                left = left[count:]
            if text:
                yield Text(text, style="table.caption")

    def _is_too_wide(
        self, columns: Sequence[Column], name: int, tight: bool, console: Console, options: ConsoleOptions
    ) -> bool:
        return _least(self._part(columns, name, tight), console, options) > options.max_width

    def _part(self, columns: Sequence[Column], name: int, tight: bool) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 0 if tight else 1),
            collapse_padding=True,
            pad_edge=False,
        )
        table.add_column(escape(self.names.head), style="bold", min_width=name, overflow="fold")
        for column in (*self.beside, *columns):
            table.add_column(escape(column.head), justify="right", no_wrap=True, min_width=column.width)
        for cells in zip(self.names.cells, *(column.cells for column in (*self.beside, *columns)), strict=True):
            table.add_row(*map(escape, cells))
        return table


def _least(table: Table, console: Console, options: ConsoleOptions) -> int:
    """The smallest width at which nothing is cut."""
    return Measurement.get(console, options.update(width=1000), table).minimum
