"""`tokenprune demo`: a page to play with a model and two strategies."""

from __future__ import annotations

from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from tokenprune.cli.arguments import Device, Dtype, Threads, VisionTower
from tokenprune.cli.printing import note

LOCAL = ("127.0.0.1", "::1", "localhost")


def command(
    model: Annotated[str, typer.Argument(help="Bundled model, checkpoint folder, or hub id.")] = "lisa-tiny",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 = any free one.")] = 7860,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Serve a page to play with: a picture, a query, and two strategies side by side.

    It shows masks, image tokens stage by stage, FLOPs, milliseconds, and a curve over budgets. Nothing goes to other
    machines.
    """
    from tokenprune.cli.checks import check_model
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.demo.server import address, app_of, check_installed, serve
    from tokenprune.utils.sockets import opened
    from tokenprune.utils.threads import checked, choose

    quiet_loading()
    checked(threads, "--threads")
    check_installed()
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    with (
        opened(host, port) as listening,
        TemporaryDirectory(prefix="tokenprune-demo-", ignore_cleanup_errors=True) as uploads,
        suppress(KeyboardInterrupt),  # how it is ended
    ):
        loaded = load_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
        app = app_of(loaded, uploads, choose(threads))
        if host not in LOCAL:
            note(f"--host {host}: other machines can use the page, without a password")
        typer.echo(f"{loaded.name} at {address(listening)} (Ctrl-C ends it)")
        serve(app, listening)
