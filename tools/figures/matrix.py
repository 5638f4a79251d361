"""Write the tables of `docs/compatibility.md`: every strategy on a tiny model of every family.

    python tools/figures/matrix.py [--check]

A table stands between `<!-- compatibility: NAME -->` and `<!-- end -->`; NAME is a function below. With `--check`
nothing is written and a page that differs from what models and strategies declare is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from string import ascii_uppercase

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from compat_models import PLAIN, ROWS, columns, row  # noqa: E402

import tokenprune as tp  # noqa: E402
from tokenprune.engine.interface.compatibility import declaration_of  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
RUNS = "✓"
MARKED = re.compile(r"<!-- compatibility: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def matrix() -> str:
    """Strategies that run everywhere; groups of models; groups of other strategies, with reasons that cells refer to.

    Models of equal cells share a column, strategies of equal cells a row, so that the table has room on a phone.
    """
    reasons: dict[str, int] = {}
    asked = {
        head(label): [cell(tp.compatible(strategy, row(name).model), reasons) for name in ROWS]
        for label, strategy in columns().items()
    }
    groups = alike(dict(zip(ROWS, zip(*asked.values(), strict=True), strict=True)))
    letters = ascii_uppercase[: len(groups)]
    first = [ROWS.index(names[0]) for names in groups]
    everywhere = [label for label, cells in asked.items() if {*cells} == {RUNS}]
    others = alike({label: tuple(cells) for label, cells in asked.items() if label not in everywhere})
    return "\n".join(
        (
            f"On every model: {', '.join(everywhere)}.\n",
            table(
                ("", "models"), [(a, ", ".join(map(title, names))) for a, names in zip(letters, groups, strict=True)]
            ),
            '<div class="matrix" markdown>\n',
            table(
                ("strategy", *(short(a, names) for a, names in zip(letters, groups, strict=True))),
                [(", ".join(labels), *(asked[labels[0]][number] for number in first)) for labels in others],
            ),
            "</div>\n",
            "".join(f"{number}. {reason}\n" for reason, number in reasons.items()),
        )
    )


def offers() -> str:
    """What the vision side of every family offers; families that offer the same share a row."""
    offered = {name: tuple(sorted(kind.__name__ for kind in declaration_of(row(name).model).offers())) for name in ROWS}
    groups = alike(offered)
    rows = [(", ".join(map(title, names)), reads_of(offered[names[0]])) for names in groups]
    return table(("models", "reads"), rows)


def reads() -> str:
    """What every strategy reads, on one model or another; strategies that read the same share a row."""
    found = {}
    for label, strategy in columns().items():
        some = dict.fromkeys(tp.compatible(strategy, row(name).model).reads for name in ROWS)
        found[head(label)] = "; or ".join(map(reads_of, some))
    return table(("strategies", "reads"), [(", ".join(labels), found[labels[0]]) for labels in alike(found)])


def alike(found: Mapping[str, Hashable]) -> list[list[str]]:
    """Names of equal values, together."""
    groups: dict[Hashable, list[str]] = {}
    for name, value in found.items():
        groups.setdefault(value, []).append(name)
    return list(groups.values())


def reads_of(names: Iterable[str]) -> str:
    """Names of reads as code, or a dash."""
    return ", ".join(f"`{name}`" for name in names) or "–"


def short(letter: str, names: list[str]) -> str:
    """The head of a column: a letter, and the models where a mouse rests on it."""
    models = ", ".join(title(name).replace("`", "") for name in names)
    return f'<abbr title="{models}">{letter}</abbr>'


def cell(found: tp.Compatibility, reasons: dict[str, int]) -> str:
    """A check mark, or a cross with the number of the reason."""
    if found.runs:
        return RUNS
    return f"✗&nbsp;{reasons.setdefault(reason(found), len(reasons) + 1)}"


def reason(found: tp.Compatibility) -> str:
    """The reason without the names of strategy and model."""
    if found.missing:
        return f"Requires {', '.join(f'`{read}`' for read in found.missing)}, which the model does not provide."
    text = found.reason.removeprefix(f"strategy {found.strategy!r} is incompatible with model {found.model!r}: ")
    return f"{text[:1].upper()}{text[1:]}."


def title(name: str) -> str:
    """A family as people call it, and the name by which tests know it."""
    return f"{row(name).title} (`{name}`)" if name != PLAIN else f"{row(name).title}"


def head(label: str) -> str:
    """A strategy's name, and its options."""
    name, *options = label.split(", ")
    return " ".join((f"`{name}`", *(f"with `{part}`" if not i else f"`{part}`" for i, part in enumerate(options))))


def table(top: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [top, ("---",) * len(top), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (matrix, offers, reads)}


def written(text: str) -> str:
    """The page with its tables as they should be."""
    return MARKED.sub(
        lambda found: f"<!-- compatibility: {found[1]} -->\n\n{TABLES[found[1]]()}\n<!-- end -->\n",
        text,
    )


def main() -> int:
    """Write or check the page; 1 if it differs."""
    text = PAGE.read_text(encoding="utf-8")
    if written(text) == text:
        return 0
    if "--check" in sys.argv:
        print(f"{PAGE}: differs from what models and strategies declare; run python tools/figures/matrix.py")
        return 1
    PAGE.write_text(written(text), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
