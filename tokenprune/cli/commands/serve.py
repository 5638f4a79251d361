"""`tokenprune serve`: a web server for one model."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from tokenprune.cli.arguments import Budget, Device, Dtype, OptionTexts, StrategyName, Threads, VisionTower


# ruff: noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too: hence Optional
def command(
    model: Annotated[str, typer.Argument(help="Bundled model, checkpoint folder, or hub id.", metavar="MODEL")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    queue: Annotated[int, typer.Option(help="Complete requests that may wait or run; others get 503.")] = 32,
    batch: Annotated[
        Optional[int], typer.Option(help="Requests that run together.", show_default="8; 2 on a CPU")
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(help="Largest image file, in MB of 2^20 bytes.")] = 10.0,
    max_pixels: Annotated[int, typer.Option(help="Largest image.")] = 25_000_000,
    timeout: Annotated[float, typer.Option(help="Seconds for an upload, and then for its answer.")] = 60.0,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP: POST /segment for masks, or POST /answer for words, with a strategy for each request.

    --strategy and --budget are for requests that name no strategy. SIGTERM or Ctrl-C ends the server once the requests
    that it has are answered. There is no authentication: put a proxy in front of it.
    """
    from tokenprune.cli.checks import check_model, strategy_request
    from tokenprune.cli.models import load_any_model, quiet_loading
    from tokenprune.serve.limits import check_installed, limits_of
    from tokenprune.utils.threads import checked, choose, using

    check_installed()
    quiet_loading()
    checked(threads, "--threads")
    limits = limits_of(queue, batch, max_upload_mb, max_pixels, timeout)
    name, budget, options = strategy_request(strategy, option or [], budget)
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)

    from tokenprune.serve.server import serve
    from tokenprune.serve.strategies import Choices
    from tokenprune.serve.work import check_work
    from tokenprune.utils.sockets import opened

    choices = Choices(name, budget, **options)
    with opened(host, port) as listening, using(choose(threads)):
        loaded = load_any_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
        check_work(loaded, choices.default, batch)
        serve(loaded, listening, choices, limits, typer.echo)
