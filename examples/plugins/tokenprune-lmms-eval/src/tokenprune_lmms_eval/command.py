"""`tokenprune lmms-eval`: accuracy beside tokens and FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer


# ruff: noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too: hence Optional
def command(
    logs: Annotated[list[Path], typer.Argument(help="Folders given to lmms-eval as --output_path.")],
    out: Annotated[Optional[Path], typer.Option(help="Write a CSV file with a row for each answer.")] = None,
    into: Annotated[
        Optional[Path], typer.Option(help="Store the answers in the folder of a sweep, or in a new one, for a report.")
    ] = None,
) -> None:
    """Show lmms-eval's scores beside image tokens and FLOPs: a row for each run, task and metric.

    FLOPs are those of the decoder's prefill, as a share of the same prompts' without pruning. With --into they are
    stored, and `tokenprune report` shows them; answers that are stored already are left as they are.
    """
    from tokenprune.sweeps.answers import store_answers
    from tokenprune.utils.files import replacing
    from tokenprune_lmms_eval.answers import answer_sets, read_logs, summarized

    answers = read_logs(logs)
    columns = ["dataset", "label", "metric", "score", "stderr", "answers", "image_tokens", "equivalent_tokens", "flops"]
    table = summarized(answers)
    lines = [columns, ["---"] * len(columns)]
    lines += [[_shown(value) for value in row] for row in table[columns].itertuples(index=False)]
    for line in lines:
        typer.echo(f"| {' | '.join(line)} |")
    if out is not None:
        with replacing(out) as temporary:
            answers.to_csv(temporary, index=False)
        typer.echo(f"wrote {out}", err=True)
    if into is not None:
        added = store_answers(into, answer_sets(logs))
        typer.echo(f"stored {added} new answers in {into}", err=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{round(value, 3):g}"
    return "–" if value is None else str(value)
