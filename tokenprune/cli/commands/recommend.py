"""`tokenprune recommend`: which strategies save time on this machine, from how many image tokens on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tokenprune.cli.arguments import Device, Dtype, ModelName, Threads, VisionTower, path
from tokenprune.cli.commands.listing import Format
from tokenprune.cli.printing import NARROW_PIPE, note, progress, say_json

if TYPE_CHECKING:
    from tokenprune.recommendation.results import Recommendation


# ruff: noqa: UP045 - typer reads annotations at run time, on Python 3.10 too
def command(
    context: typer.Context,
    model: ModelName = "lisa-tiny",
    shape: Annotated[
        Optional[str],
        typer.Option(
            "--model-shape",
            metavar="SHAPE",
            help="Instead of a model, random weights of these sizes: 7b, 13b, or a config.json (or its folder).",
        ),
    ] = None,
    layers: Annotated[Optional[int], typer.Option(help="Decoder layers, with --model-shape.")] = None,
    image_tokens: Annotated[
        Optional[list[int]],
        typer.Option(metavar="N", help="Image tokens of a prompt; may be repeated.", show_default="64, 144, 256, 576"),
    ] = None,
    batch: Annotated[
        Optional[list[int]], typer.Option(metavar="B", help="Prompts in a batch; may be repeated.", show_default="1")
    ] = None,
    budget: Annotated[
        Optional[str],
        typer.Option(
            help="Equivalent image tokens as a share of all, in (0, 1]; several separated by commas.",
            show_default="0.35; 0.5,0.35,0.2 with --budget-ms",
        ),
    ] = None,
    budget_ms: Annotated[
        Optional[float], typer.Option(metavar="MS", help="List what fits: milliseconds of a batch's prefill.")
    ] = None,
    strategies: Annotated[
        Optional[str],
        typer.Option(
            help="Names separated by commas; options after a colon, as in csp:query=seg.",
            show_default="all that take a budget",
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="All other tokens of the prompt.")] = 36,
    seconds: Annotated[float, typer.Option(help="Time for measuring.")] = 60.0,
    rounds: Annotated[int, typer.Option(help="Measured runs of everything, at most.")] = 40,
    results: Annotated[
        Optional[Path],
        typer.Option(
            parser=path,
            metavar="RUN",
            help="Look accuracies up in a sweep's folder, or in what compare --out wrote.",
            show_default="results of the bundled models",
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(parser=path, help="JSON file to write the result to.")] = None,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.table,
) -> None:
    """Measure which strategies save time on this machine, from how many image tokens and which batch size on.

    Prefills on random states are timed with every strategy and without pruning, in turn, for about a minute. The
    accuracy that is known of a strategy is shown with the model that it was measured on.
    """
    from tokenprune.cli.checks import check_model, check_strategies, refuse_given
    from tokenprune.cli.commands.compare import numbers
    from tokenprune.cli.models import quiet_loading
    from tokenprune.cli.shapes import decoder_spec
    from tokenprune.core.by_name import parse_text, split_list
    from tokenprune.errors import OptionError
    from tokenprune.evaluation.contenders import budgets_of
    from tokenprune.report.files import check_place
    from tokenprune.utils.threads import checked, choose

    quiet_loading()
    checked(threads, "--threads")
    chosen = None if strategies is None else split_list(strategies)
    budgets = None if budget is None else budgets_of(numbers(budget))
    check_strategies(parse_text(item)[0] for item in chosen or ())
    if shape is None:
        refuse_given(context, ["layers"], "without --model-shape")
        check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    else:
        refuse_given(context, ["model", "vision_tower"], "with --model-shape")
    if layers is not None and layers < 1:
        raise OptionError(f"--layers {layers} found, expected a whole number of at least 1")
    if out is not None:
        check_place(out)

    from tokenprune.recommendation.recommend import recommend

    with progress(time_left=True) as report:
        measured: Any
        if shape is None:
            measured = _loaded(model, vision_tower, dtype, device)
        else:
            spec = decoder_spec(shape, {} if layers is None else {"layers": layers})
            measured = _random(shape, spec, dtype, device)
        found = recommend(
            measured,
            chosen,
            budgets,
            image_tokens=image_tokens or None,
            batch=batch or 1,
            budget_ms=budget_ms,
            text_tokens=text_tokens,
            seconds=seconds,
            rounds=rounds,
            results=results,
            name=model if shape is None else None,
            progress=report,
            threads=choose(threads),
        )
    try:  # write the file before printing, which may fail
        if out is not None:
            _write(found, out)
    finally:
        _show(found, output)
    found.check_fits()


def _loaded(model: str, vision_tower: Path | None, dtype: str | None, device: str | None) -> Any:
    from tokenprune import api

    options = {"vision_tower": vision_tower, "dtype": dtype, "device": device}
    return api.load(model, **{name: value for name, value in options.items() if value is not None})


def _random(shape: str, spec: Any, dtype: str | None, device: str | None) -> Any:
    import torch

    from tokenprune.loading.device_names import check_device, check_dtype
    from tokenprune.recommendation.decoders import RandomModel

    check_dtype(dtype or "float32")
    check_device(device or "cpu")
    kind = getattr(torch, (dtype or "float32").removeprefix("torch."))
    return RandomModel(spec, kind, device or "cpu", f"{Path(shape).name} with random weights")


def _write(found: Recommendation, out: Path) -> None:
    from tokenprune.utils.files import replacing

    with replacing(out) as file:
        file.write_text(found.to_json() + "\n", encoding="utf-8")
    note(f"wrote {out}")


def _show(found: Recommendation, output: Format) -> None:
    if output is Format.json:
        say_json(found.to_json())
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = NARROW_PIPE
    console.print(found.table())
