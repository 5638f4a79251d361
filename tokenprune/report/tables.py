"""Tables of a sweep for papers and for further work: LaTeX, Markdown and CSV; a row a strategy, columns a budget."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from tokenprune.evaluation.comparison.tables import si
from tokenprune.evaluation.statistics import Estimate
from tokenprune.report.answer_tables import answer_tables
from tokenprune.report.markup import latex_row, latex_text, markdown_line, markdown_text, one_line
from tokenprune.report.page.data import Group, Row, Study
from tokenprune.utils.files import replacing

HEADINGS = ("gIoU", "cIoU", "tokens", "FLOPs")


@dataclass(frozen=True)
class Cell:
    """A strategy at a budget.

    Attributes:
        row: its numbers.
        best_giou, best_ciou: whether no other strategy of the budget has a larger one, as printed.
    """

    row: Row
    best_giou: bool
    best_ciou: bool


def write_tables(study: Study, folder: Path) -> list[Path]:
    """Write results.csv, results.md and results.tex if there are records, and answers.csv, … if there are answers.

    Returns the paths. Raises InputError if one cannot be written.
    """
    texts: dict[str, str] = {}
    if study.groups:
        texts |= {"results.csv": as_csv(study), "results.md": as_markdown(study), "results.tex": as_latex(study)}
    if study.answers:
        texts |= {f"answers.{suffix}": text for suffix, text in answer_tables(study.answers).items()}
    paths = []
    for name, text in texts.items():
        path = folder / name
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
        paths.append(path)
    return paths


def cells_of(group: Group) -> dict[str, dict[float | None, Cell]]:
    """By method and budget; None is the budget of strategies that take none."""
    found: dict[str, dict[float | None, Cell]] = {method: {} for method in group.methods}
    for budget in columns_of(group):
        rows = [row for row in group.rows if row.line.budget == budget]
        giou, ciou = (max(_printed(of(row)) for row in rows) for of in (_giou, _ciou))
        for row in rows:
            best = _printed(_giou(row)) == giou, _printed(_ciou(row)) == ciou
            found[row.method][budget] = Cell(row, *(best if budget is not None else (False, False)))
    return found


def columns_of(group: Group) -> list[float | None]:
    """The budgets, after None if there are strategies without one."""
    without: list[float | None] = [None] if any(row.line.budget is None for row in group.rows) else []
    return without + list(group.budgets)


def as_csv(study: Study) -> str:
    """All groups in one table, with the ends of intervals and unrounded numbers."""
    budgets = list(dict.fromkeys(budget for group in study.groups for budget in columns_of(group)))
    budgets.sort(key=lambda budget: 2.0 if budget is None else budget, reverse=True)
    names = ("gIoU", "gIoU low", "gIoU high", "cIoU", "cIoU low", "cIoU high", "tokens", "FLOPs", "KV bytes")
    head = ["model", "dataset", "split", "protocol", "queries", "strategy"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head + [f"{name}, {_at(budget)}" for budget in budgets for name in names])
    for group in study.groups:
        for method, cells in cells_of(group).items():
            line: list[object] = [group.model, group.dataset, group.split, group.protocol, group.queries, method]
            for budget in budgets:
                cell = cells.get(budget)
                line += [""] * len(names) if cell is None else _numbers(cell.row)
            writer.writerow(line)
    return buffer.getvalue()


def as_markdown(study: Study) -> str:
    """A table for each group; the best of each budget is bold."""
    parts = []
    for group in study.groups:
        columns = columns_of(group)
        head = ["strategy"] + [f"{name}, {_at(budget)}" for budget in columns for name in HEADINGS]
        lines = [
            f"## {markdown_text(group.title)}, {group.queries} queries\n",
            markdown_line(head),
            markdown_line(["---"] * len(head)),
        ]
        for method, cells in cells_of(group).items():
            found = [text for budget in columns for text in _texts(cells.get(budget), latex=False)]
            lines.append(markdown_line([markdown_text(method), *found]))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def as_latex(study: Study) -> str:
    """A tabular (booktabs) for each group; the best of each budget is bold, strategies without a budget come first."""
    parts = ["% needs \\usepackage{booktabs}; super- and subscripts are distances to the ends of 95 % intervals\n"]
    for group in study.groups:
        cells = cells_of(group)
        budgets: list[float | None] = [*group.budgets]
        wide = len(HEADINGS) * max(len(budgets), 1)
        lines = [
            f"% {one_line(group.title)}, {group.queries} queries",
            rf"\begin{{tabular}}{{l{'r' * wide}}}",
            r"\toprule",
        ]
        if budgets:
            tops = [rf"\multicolumn{{{len(HEADINGS)}}}{{c}}{{budget {budget:g}}}" for budget in budgets]
            ends = [(2 + len(HEADINGS) * place, 1 + len(HEADINGS) * (place + 1)) for place in range(len(budgets))]
            lines += [latex_row(["", *tops]), "".join(rf"\cmidrule(lr){{{first}-{last}}}" for first, last in ends)]
        lines += [latex_row(["strategy", *HEADINGS * max(len(budgets), 1)]), r"\midrule"]
        for method, found in cells.items():
            if budgets and None in found:
                texts = _texts(found[None], latex=True)
                told = ", ".join(f"{name} {text}" for name, text in zip(HEADINGS, texts, strict=True))
                lines.append(latex_row([latex_text(method), rf"\multicolumn{{{wide}}}{{l}}{{{told}}}"]))
        if budgets and any(None in found for found in cells.values()):
            lines.append(r"\midrule")
        for method, found in cells.items():
            if not budgets or found.keys() - {None}:
                texts = [text for budget in budgets or [None] for text in _texts(found.get(budget), latex=True)]
                lines.append(latex_row([latex_text(method), *texts]))
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n")
    return "\n".join(parts)


def _texts(cell: Cell | None, latex: bool) -> list[str]:
    """The columns of a budget, as in `HEADINGS`."""
    if cell is None:
        return ["--" if latex else "–"] * len(HEADINGS)
    line, interval = cell.row.line, _latex if latex else _markdown
    percent = r"\,\%" if latex else " %"
    flops = si(line.flops) if line.flops_ratio is None else f"{100 * line.flops_ratio:.0f}{percent}"
    tokens = f"{line.equivalent_tokens:.1f}"
    return [interval(line.giou, cell.best_giou), interval(line.ciou, cell.best_ciou), tokens, flops]


def _markdown(one: Estimate, best: bool) -> str:
    value = f"**{_printed(one)}**" if best else _printed(one)
    return f"{value} {str(one).partition(' ')[2]}"


def _latex(one: Estimate, best: bool) -> str:
    value = rf"\mathbf{{{_printed(one)}}}" if best else _printed(one)
    if one.interval is None:
        return f"${value}$"
    return f"${value}_{{-{one.value - one.low:.3f}}}^{{+{one.high - one.value:.3f}}}$"


def _numbers(row: Row) -> list[object]:
    line = row.line
    ends = [number for one in (line.giou, line.ciou) for number in (one.value, one.low, one.high)]
    return [*ends, line.equivalent_tokens, line.flops, line.kv_bytes]


def _giou(row: Row) -> Estimate:
    return row.line.giou


def _ciou(row: Row) -> Estimate:
    return row.line.ciou


def _printed(one: Estimate) -> str:
    return f"{one.value:.3f}"


def _at(budget: float | None) -> str:
    return "no budget" if budget is None else f"at {budget:g}"
