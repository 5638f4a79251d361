"""`tokenprune segment`: the mask of a user's own image and query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tokenprune.cli.arguments import Budget, Device, Dtype, ModelName, OptionTexts, StrategyName, VisionTower


def command(
    image: Annotated[Path, typer.Argument(help="Image file.", metavar="IMAGE")],
    query: Annotated[str, typer.Argument(help="What to segment, in words.", metavar="QUERY")],
    out: Annotated[Path, typer.Option(help="Mask to write, PNG: white where the mask is.")],
    model: ModelName = "lisa-tiny",
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    overlay: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Picture to write as well: image, mask, tokens stage by stage, PNG."),
    ] = None,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Segment an image by a query, and write the mask as PNG."""
    from tokenprune import api
    from tokenprune.cli.checks import check_model, check_strategies
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.cli.options import parse_options
    from tokenprune.report.files import check_targets, write_mask

    quiet_loading()
    check_strategies([strategy])
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    check_targets({"--out": out, "--overlay": overlay}, inputs=[image])
    chosen = api.strategy(strategy, budget, **parse_options(option or []))

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
