"""`tokenprune inspect`: which tokens of one sample a strategy keeps, parks and merges, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tokenprune.cli.arguments import (
    Budget,
    Device,
    Dtype,
    ModelName,
    OptionTexts,
    StrategyName,
    Threads,
    VisionTower,
    path,
)


def command(
    context: typer.Context,
    image: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(parser=path, help="Image file; without one, a sample of the dataset.", metavar="[IMAGE]"),
    ] = None,
    query: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="What to segment, in words.", metavar="[QUERY]"),
    ] = None,
    out: Annotated[Path, typer.Option(parser=path, help="Picture to write, PNG.")] = Path("inspect.png"),
    model: ModelName = "lisa-tiny",
    strategy: StrategyName = "csp",
    option: OptionTexts = None,
    budget: Budget = None,
    dataset: Annotated[str, typer.Option(help="Name of a dataset, name:PATH, or module:Class.")] = "shapes",
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    index: Annotated[int, typer.Option(help="Number of the query in the split, from 0.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the dataset.")] = 0,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Draw one sample: kept, parked and merged tokens stage by stage, with the scores that they were chosen by."""
    from tokenprune import api
    from tokenprune.cli.checks import check_image, check_model, refuse_given, strategy_request
    from tokenprune.cli.images import words
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.datasets.validation import check_request
    from tokenprune.errors import InputError
    from tokenprune.report.files import check_drawing, check_targets
    from tokenprune.utils.arguments import whole_number
    from tokenprune.utils.threads import checked, choose, using

    quiet_loading()
    checked(threads, "--threads")
    check_drawing("inspect")
    name, budget, options = strategy_request(strategy, option or [], budget)
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    data = None
    if image is None:
        whole_number("index", index, 0)
        data = check_request(dataset, split, index + 1, seed)
    elif query is None:
        raise InputError(f"image {str(image)!r} is given without a query; give both, or neither for a sample")
    else:
        refuse_given(context, ["dataset", "split", "index", "seed"], "with an image of your own")
        query = words(query, "query", [Path(image)])
        check_image(image)
    check_targets({"--out": out}, inputs=[] if image is None else [image])
    chosen = api.strategy(name, budget, **options)

    from tokenprune.evaluation.samples import run_query, run_single, sample, token_summary
    from tokenprune.report.overlays import inspection_sheet, save

    picked = None if data is None else sample(data, split, index, seed)
    loaded = load_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    with using(choose(threads)):
        if picked is not None:
            record = run_query(loaded, *picked, strategy=chosen)
        else:
            record = run_single(loaded, image, query or "", chosen)
    save(inspection_sheet(record), out)
    typer.echo(f"wrote {out}: {record.query!r}")
    typer.echo(token_summary(record.outcomes[0]))
