"""Names as tables and figures show them: on one line, and as LaTeX, Markdown and matplotlib print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"[": "{[}", "*": "{*}"},  # which after the end of a row are its arguments
}
MARKDOWN = {**{char: f"\\{char}" for char in "\\`*[]|"}, "&": "&amp;", "<": "&lt;"}


def one_line(text: str) -> str:
    """A text without line breaks and control characters: each run of them is a space."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def latex_text(text: str) -> str:
    """A text as LaTeX prints it, on one line."""
    return "".join(LATEX.get(char, char) for char in one_line(text))


def markdown_text(text: str) -> str:
    """A text as Markdown prints it, on one line; also in a table."""
    return "".join(MARKDOWN.get(char, char) for char in one_line(text))


def markdown_line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def latex_row(cells: Sequence[str]) -> str:
    """A row of a tabular."""
    return rf"{' & '.join(cells)} \\"


def legend(owner: Any, entries: Iterable[tuple[Any, str]], **look: Any) -> None:
    """A matplotlib legend whose labels are printed as they are; none if there is no entry.

    matplotlib itself leaves out labels that begin with an underscore, and reads what is between dollars as mathematics.

    Args:
        owner: figure or axes.
        entries: what is drawn, and its label.
        look: further arguments of matplotlib's `legend`.
    """
    found = list(entries)
    if not found:
        return
    made = owner.legend([handle for handle, _ in found], [str(place) for place in range(len(found))], **look)
    for text, (_, label) in zip(made.get_texts(), found, strict=True):
        text.set(text=one_line(label), parse_math=False)
