"""`tokenprune segment`: the mask of a user's own image and query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

OptionList = Optional[list[str]]  # noqa: UP045 - typer reads annotations at run time, on Python 3.10 too


def command(
    image: Annotated[Path, typer.Argument(help="Image file.", metavar="IMAGE")],
    query: Annotated[str, typer.Argument(help="What to segment, in words.", metavar="QUERY")],
    out: Annotated[Path, typer.Option(help="Mask to write, PNG: white where the mask is.")],
    model: Annotated[str, typer.Option(help="Bundled model, checkpoint folder, or hub id.")] = "lisa-tiny",
    strategy: Annotated[str, typer.Option(help="Name of a strategy.")] = "none",
    option: Annotated[
        OptionList, typer.Option("-o", "--option", metavar="KEY=VALUE", help="Option of the strategy; may be repeated.")
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Equivalent image tokens as a share of all, in (0, 1]."),
    ] = None,
    overlay: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Picture to write as well: image, mask, tokens stage by stage, PNG."),
    ] = None,
    vision_tower: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The model's vision tower, where the checkpoint does not hold it."),
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, …")] = None,  # noqa: UP045
) -> None:
    """Segment an image by a query, and write the mask as PNG."""
    from tokenprune import api
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.cli.options import parse_options
    from tokenprune.report.files import check_target, write_mask

    quiet_loading()
    chosen = api.strategy(strategy, budget, **parse_options(option or []))
    for path in (out, overlay):
        if path is not None:
            check_target(path)

    from tokenprune.evaluation.single import run_single, token_summary

    record = run_single(load_model(model, vision_tower=vision_tower, dtype=dtype, device=device), image, query, chosen)
    outcome = record.outcomes[0]
    write_mask(outcome.mask, out)
    share = float(outcome.mask.mean())
    height, width = outcome.mask.shape
    typer.echo(f"wrote {out}: {width}×{height}, mask covers {share:.1%} of the image")
    if overlay is not None:
        from tokenprune.report.overlays import inspection_sheet, save

        save(inspection_sheet(record), overlay)
        typer.echo(f"wrote {overlay}")
    typer.echo(token_summary(outcome))
