"""`tokenprune segment`: the masks of a user's own images and query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tokenprune.cli.arguments import Budget, Device, Dtype, ModelName, OptionTexts, StrategyName, Threads, VisionTower

if TYPE_CHECKING:
    from tokenprune.evaluation.samples import SampleRecord


def command(
    images: Annotated[
        list[Path], typer.Argument(help='Image files, folders of images, patterns as "*.jpg".', metavar="IMAGE...")
    ],
    query: Annotated[str, typer.Argument(help="What to segment, in words.", metavar="QUERY")],
    out: Annotated[
        Path, typer.Option(help="Mask to write, PNG: white where the mask is. For several images a folder.")
    ],
    model: ModelName = "lisa-tiny",
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    overlay: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Picture to write as well: image, mask, tokens stage by stage, PNG. As --out."),
    ] = None,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment images by a query, and write the masks as PNG.

    Several images (files, a folder, a pattern) are done one by one. One that cannot be used is told, the others are
    done, and the exit code is 1.
    """
    from tokenprune import api
    from tokenprune.cli.images import find_images, unusable, words
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.cli.options import parse_options
    from tokenprune.errors import InputError
    from tokenprune.report.files import check_target
    from tokenprune.threads import checked, choose, using

    quiet_loading()
    checked(threads, "--threads")
    chosen = api.strategy(strategy, budget, **parse_options(option or []))
    words(query, "query")
    found = find_images(images)
    if overlay is not None and overlay.expanduser().resolve() == out.expanduser().resolve():
        raise InputError(f"--overlay and --out are both {str(out)!r}; choose another path for one of them")
    masks, overlays = (None if path is None else found.targets(path) for path in (out, overlay))
    for path in (out, overlay):
        if path is not None:
            _check_folder(path) if found.many else check_target(path)

    from tokenprune.evaluation.single import run_single

    failed = 0
    with using(choose(threads)):
        loaded = load_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
        for number, image in enumerate(found.paths):
            with unusable(image, found) as problem:
                record = run_single(loaded, image, query, chosen)
            if problem:
                failed += 1
                continue
            assert masks is not None
            _write(record, masks[number], None if overlays is None else overlays[number])
    if failed:
        typer.echo(f"error: {failed} of {len(found.paths)} images could not be segmented", err=True)
        raise typer.Exit(1)


def _write(record: SampleRecord, out: Path, overlay: Path | None) -> None:
    from tokenprune import stopwatch
    from tokenprune.evaluation.single import token_summary
    from tokenprune.report.files import write_mask

    outcome = record.outcomes[0]
    write_mask(outcome.mask, out)
    height, width = outcome.mask.shape
    typer.echo(f"wrote {out}: {width}×{height}, mask covers {float(outcome.mask.mean()):.1%} of the image")
    if overlay is not None:
        from tokenprune.report.overlays import inspection_sheet, save

        save(inspection_sheet(record), overlay)
        typer.echo(f"wrote {overlay}")
    typer.echo(token_summary(outcome))
    typer.echo(stopwatch.told(outcome.milliseconds))


def _check_folder(path: Path) -> None:
    from tokenprune.errors import InputError
    from tokenprune.report.write import writable_folder

    if path.suffix.lower() == ".png" or path.is_file():
        raise InputError(f"output {str(path)!r} is a file, and there may be several images; name a folder")
    writable_folder(path)
