"""Write the tables of `docs/compatibility.md`: every strategy on a tiny model of every family.

    python tools/figures/matrix.py [--check]

A table stands between `<!-- compatibility: NAME -->` and `<!-- end -->`; NAME is a function below. With `--check`
nothing is written and a page that differs from what models and strategies declare is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from compat_models import PLAIN, ROWS, columns, row  # noqa: E402

import tokenprune as tp  # noqa: E402
from tokenprune.engine.interface.compatibility import declaration_of  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
MARKED = re.compile(r"<!-- compatibility: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def matrix() -> str:
    """Rows are families, columns strategies, those of equal cells together; then the reasons that cells refer to."""
    reasons: dict[str, int] = {}
    alike: dict[tuple[str, ...], list[str]] = {}
    for label, strategy in columns().items():
        cells = tuple(cell(tp.compatible(strategy, row(name).model), reasons) for name in ROWS)
        alike.setdefault(cells, []).append(head(label))
    rows = list(zip(map(title, ROWS), *alike, strict=True))
    notes = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    return f"{table(('model', *('<br>'.join(names) for names in alike.values())), rows)}\n{notes}"


def offers() -> str:
    """What the vision side of every family offers."""
    offered = {name: {kind.__name__ for kind in declaration_of(row(name).model).offers()} for name in ROWS}
    kinds = sorted(set().union(*offered.values()))
    rows = [(title(name), *("✓" if kind in offered[name] else "" for kind in kinds)) for name in ROWS]
    return table(("model", *(f"`{kind}`" for kind in kinds)), rows)


def reads() -> str:
    """What every strategy reads, on one model or another."""
    rows = []
    for label, strategy in columns().items():
        found = dict.fromkeys(tp.compatible(strategy, row(name).model).reads for name in ROWS)
        rows.append((head(label), "; or ".join(", ".join(f"`{read}`" for read in some) or "–" for some in found)))
    return table(("strategy", "reads"), rows)


def cell(found: tp.Compatibility, reasons: dict[str, int]) -> str:
    """A check mark, or a cross with the number of the reason."""
    if found.runs:
        return "✓"
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
