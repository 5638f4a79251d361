"""Tables of answers for papers and for further work: LaTeX, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from tokenprune.report.markup import latex_row, latex_text, markdown_line, markdown_text, one_line
from tokenprune.report.page.data import AnswerGroup
from tokenprune.sweeps.answer_summary import AnswerLine, ScoreEstimate

COSTS = ("image tokens", "tokens", "FLOPs", "answers")


def answer_tables(groups: Sequence[AnswerGroup]) -> dict[str, str]:
    """The texts of the three tables, by the suffix of their files."""
    return {"csv": as_csv(groups), "md": as_markdown(groups), "tex": as_latex(groups)}


def as_csv(groups: Sequence[AnswerGroup]) -> str:
    """A row for each metric of each strategy, with unrounded numbers; what is not known is empty.

    A strategy without a score has one row, whose metric is empty.
    """
    head = ["model", "dataset", "split", "protocol", "strategy", "budget", "label", "metric", "score", "stderr"]
    head += ["low", "high", "answers", "image tokens", "equivalent tokens", "FLOPs share"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for group in groups:
        for method, line in _lines(group):
            costs = [line.answers, line.image_tokens, line.equivalent_tokens, line.flops_ratio]
            scores = [(metric, *_numbers(score)) for metric, score in line.scores.items()] or [(None,) * 5]
            for score in scores:
                writer.writerow([*line.where, method, line.budget, line.label, *score, *costs])
    return buffer.getvalue()


def as_markdown(groups: Sequence[AnswerGroup]) -> str:
    """A table for each group: a row for each strategy and budget, a column for each metric."""
    parts = []
    for group in groups:
        head = ["strategy", "budget", *group.metrics, *COSTS]
        lines = [f"## {markdown_text(group.title)}, {group.answers} answers\n"]
        lines += [markdown_line([markdown_text(name) for name in head]), markdown_line(["---"] * len(head))]
        for method, line in _lines(group):
            scores = [_markdown(line.scores.get(metric)) for metric in group.metrics]
            lines.append(markdown_line([markdown_text(method), _budget(line), *scores, *_costs(line, " %")]))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def as_latex(groups: Sequence[AnswerGroup]) -> str:
    """A tabular (booktabs) for each group, with rows and columns as in Markdown."""
    parts = ["% needs \\usepackage{booktabs}; a subscript is the distance to the ends of the 95 % interval\n"]
    for group in groups:
        head = ["strategy", "budget", *group.metrics, *COSTS]
        lines = [
            f"% {one_line(group.title)}, {group.answers} answers",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        ]
        lines += [r"\toprule", latex_row([latex_text(name) for name in head]), r"\midrule"]
        for method, line in _lines(group):
            scores = [_latex(line.scores.get(metric)) for metric in group.metrics]
            row = [latex_text(method), _budget(line), *scores, *_costs(line, r"\,\%")]
            lines.append(latex_row(["--" if cell == "–" else cell for cell in row]))
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n")
    return "\n".join(parts)


def _lines(group: AnswerGroup) -> list[tuple[str, AnswerLine]]:
    """Methods in order, the largest number of tokens first."""
    return [(method, line) for method, lines in group.methods.items() for line in lines[::-1]]


def _numbers(score: ScoreEstimate) -> tuple[float | None, ...]:
    """Value, standard error, and the ends of the interval."""
    return score.estimate.value, score.stderr, *(score.estimate.interval or (None, None))


def _budget(line: AnswerLine) -> str:
    return "–" if line.budget is None else f"{line.budget:g}"


def _costs(line: AnswerLine, percent: str) -> list[str]:
    """The columns of `COSTS`."""
    flops = "–" if line.flops_ratio is None else f"{100 * line.flops_ratio:.0f}{percent}"
    return [f"{line.image_tokens:.1f}", f"{line.equivalent_tokens:.1f}", flops, str(line.answers)]


def _markdown(score: ScoreEstimate | None) -> str:
    return "–" if score is None else str(score.estimate)


def _latex(score: ScoreEstimate | None) -> str:
    if score is None:
        return "--"
    one = score.estimate
    reach = rf"_{{\pm{one.high - one.value:.3f}}}" if one.interval else ""
    return f"${one.value:.3f}{reach}$"
