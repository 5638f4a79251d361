"""`tokenprune list`: what is installed, and which plugins are broken."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Format(str, Enum):
    """How a command prints its result."""

    table = "table"
    json = "json"


def command(
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.table,
) -> None:
    """Show strategies, adapters, data sets and models with their packages, and broken plugins with their error."""
    from tokenprune import registry
    from tokenprune.plugins import KINDS

    kinds = {kind: registry.entries(kind) for kind in KINDS}
    broken = registry.broken_plugins()
    if output is Format.json:
        import json

        found: dict[str, object] = {
            kind: [
                {"name": e.name, "summary": e.summary, "package": e.distribution, "version": e.version}
                for e in entries.values()
            ]
            for kind, entries in kinds.items()
        }
        found["broken"] = [
            {"plugin": b.name, "package": b.distribution, "version": b.version, "error": b.error} for b in broken
        ]
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kind", style="dim")
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("package")
    table.add_column("what it is")
    for kind, entries in kinds.items():
        for e in entries.values():
            table.add_row(KINDS[kind].noun, e.name, escape(f"{e.distribution} {e.version}".rstrip()), escape(e.summary))
        table.add_section()
    for b in broken:
        table.add_row("[red]broken[/red]", escape(b.name), escape(f"{b.distribution} {b.version}"), escape(b.error))
    Console().print(table)
