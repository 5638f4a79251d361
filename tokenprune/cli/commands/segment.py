"""`tokenprune segment`: masks for images and a query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tokenprune.cli.arguments import (
    Budget,
    Device,
    Dtype,
    Images,
    ModelName,
    OptionTexts,
    StrategyName,
    Threads,
    VisionTower,
    path,
)

if TYPE_CHECKING:
    from tokenprune.evaluation.samples import SampleRecord


def command(
    images: Images,
    query: Annotated[str, typer.Argument(help='What to segment, in quotes: "the red ring".', metavar="QUERY")],
    out: Annotated[
        Path,
        typer.Option(parser=path, help="Mask to write, PNG: white where the mask is. For several images a folder."),
    ],
    model: ModelName = "lisa-tiny",
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    overlay: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=path, help="Picture to write as well: image, mask, tokens stage by stage, PNG. As --out."),
    ] = None,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment images by a query, and write the masks as PNG.

    Several images (files, a folder, a pattern) are processed one by one. If one cannot be used, that is reported, the
    others are processed, and the exit code is 1.
    """
    from tokenprune import api
    from tokenprune.cli.checks import check_model, strategy_request
    from tokenprune.cli.images import find_images, unusable, words
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.cli.printing import note, working_first
    from tokenprune.report.files import check_drawing
    from tokenprune.utils.threads import checked, choose, using

    quiet_loading()
    checked(threads, "--threads")
    if overlay is not None:
        check_drawing("--overlay")
    name, budget, options = strategy_request(strategy, option or [], budget)
    query = words(query, "query", images)
    found = find_images(images)
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    targets = found.targets({"--out": out, "--overlay": overlay})
    chosen = api.strategy(name, budget, **options)

    from tokenprune.evaluation.samples import run_single

    failed = 0
    with using(choose(threads)), working_first() as say:
        loaded = load_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
        for image, *files in zip(found.paths, *targets.values(), strict=True):
            with unusable(image, found) as problem:
                record = run_single(loaded, image, query, chosen)
            if problem:
                failed += 1
                continue
            say(_written(record, *files))
    if failed:
        note(f"error: {failed} of {len(found.paths)} images could not be segmented")
        raise typer.Exit(1)


def _written(record: SampleRecord, out: Path, overlay: Path | None = None) -> str:
    """Write the mask, and the overlay if it is requested; returns the lines to print."""
    from tokenprune.evaluation.samples import token_summary
    from tokenprune.report.files import write_mask
    from tokenprune.utils import stopwatch

    outcome = record.outcomes[0]
    write_mask(outcome.mask, out)
    height, width = outcome.mask.shape
    lines = [f"wrote {out}: {width}×{height}, mask covers {float(outcome.mask.mean()):.1%} of the image"]
    if overlay is not None:
        from tokenprune.report.overlays import inspection_sheet, save

        lines.append(f"wrote {save(inspection_sheet(record), overlay)}")
    return "\n".join([*lines, token_summary(outcome), stopwatch.summary(outcome.milliseconds)])
