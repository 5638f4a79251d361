"""`tokenprune segment`: masks for images and a query."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

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


class Output(str, Enum):
    """How the command prints its results."""

    text = "text"
    json = "json"


class Answer(str, Enum):
    """Who says what is in the image."""

    forced = "forced"
    generate = "generate"


# ruff: noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too: hence Optional
def command(
    images: Images,
    out: Annotated[
        Path,
        typer.Option(parser=path, help="Mask to write, PNG: white where the mask is. For several images a folder."),
    ],
    query: Annotated[
        Optional[str],
        typer.Argument(help='What to segment, in quotes: "the red ring".', metavar="QUERY", show_default=False),
    ] = None,
    queries: Annotated[
        Optional[Path],
        typer.Option(parser=path, help="Instead of images and a query: a table of both, CSV or JSON lines (.jsonl)."),
    ] = None,
    model: ModelName = "lisa-tiny",
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    overlay: Annotated[
        Optional[Path],
        typer.Option(parser=path, help="Picture to write as well: image, mask, tokens stage by stage, PNG. As --out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that are in the folder.")] = False,
    batch_size: Annotated[
        Optional[int], typer.Option(help="Images that run together, of several.", show_default="8; 2 on a CPU")
    ] = None,
    answer: Annotated[
        Answer,
        typer.Option(help="Whether the model's answer is given, as in its evaluation, or the model generates it."),
    ] = Answer.forced,
    max_new_tokens: Annotated[
        Optional[int], typer.Option(help="Limit of a generated answer.", show_default="64")
    ] = None,
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Generate token by token; the answer is the same.")
    ] = False,
    mask_size: Annotated[
        Optional[str],
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the mask, or 'low': as the mask head makes it.",
            show_default="the image's",
        ),
    ] = None,
    output: Annotated[Output, typer.Option("--format", help="Text, or a JSON object for each image.")] = Output.text,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment images by a query, and write the masks as PNG.

    Several images (files, a folder, a pattern, a table) are read ahead and run in batches. If one cannot be used, that
    is reported, the others are processed, and the exit code is 1.
    """
    from tokenprune import api
    from tokenprune.cli.checks import check_model, strategy_request
    from tokenprune.cli.images import find_images, listed_images, words
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.cli.printing import note, say_json, working_first
    from tokenprune.cli.segmenting import Job, check_options, options_of, segment_all, segment_one
    from tokenprune.errors import OptionError
    from tokenprune.report.files import check_drawing
    from tokenprune.utils.arguments import whole_number
    from tokenprune.utils.threads import checked, choose, using

    quiet_loading()
    checked(threads, "--threads")
    if batch_size is not None:
        whole_number("--batch-size", batch_size, 1)
    options_of_model = options_of(answer.value, max_new_tokens, no_draft, mask_size)
    if overlay is not None:
        check_drawing("--overlay")
        if mask_size is not None:
            raise OptionError("--mask-size has no effect on --overlay, which draws on the image; leave one out")
    name, budget, options = strategy_request(strategy, option or [], budget)
    if queries is not None:
        if images or query is not None:
            raise OptionError("--queries names the images and their queries; leave out those on the command line")
        found, texts = listed_images(queries)
    elif query is None:
        raise typer.BadParameter("missing; give an image and what to segment in it", param_hint="QUERY")
    else:
        query = words(query, "query", images)
        found = find_images(images)
        texts = [query] * len(found.paths)
    if not found.many and (overwrite or batch_size is not None):
        which, why = ("--overwrite", "whose mask is replaced") if overwrite else ("--batch-size", "which runs alone")
        raise OptionError(f"{which} has no effect on a single image, {why}; leave it out")
    if overlay is not None and batch_size is not None:
        raise OptionError("--batch-size has no effect with --overlay, which runs images one by one; leave it out")
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    targets = found.targets({"--out": out, "--overlay": overlay}, overwrite)
    chosen = api.strategy(name, budget, **options)
    jobs = [Job(*each) for each in zip(found.paths, texts, *targets.values(), strict=True)]

    with using(choose(threads)), working_first(say_json if output is Output.json else typer.echo) as say:
        loaded = load_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
        check_options(loaded, options_of_model)
        if found.many:
            failed = segment_all(loaded, jobs, chosen, batch_size, say, output is Output.json, options_of_model)
        else:
            failed = []
            segment_one(loaded, jobs[0], chosen, say, output is Output.json, options_of_model)
    if failed:
        from tokenprune.datasets.files.dataset import listing

        names = listing([str(image) for image in failed])
        note(f"error: {len(failed)} of {len(jobs)} images could not be segmented: {names}")
        raise typer.Exit(1)
