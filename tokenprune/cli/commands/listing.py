"""`tokenprune list`: what is installed, where it comes from, and which plugins are broken."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.printing import say_json
from tokenprune.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column

    from tokenprune.plugins.entries import PluginStatus

NARROW = 72  # terminal width below which a table has two columns


class Format(str, Enum):
    """How a command prints its result."""

    table = "table"
    json = "json"


def command(
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.table,
    plugins: Annotated[bool, typer.Option("--plugins", help="Show the plugins: origin, version, status.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Show the types of models: supported, limited or refused, and why.")
    ] = False,
) -> None:
    """Show all that plugins register (strategies, models, …) with packages, and broken plugins with their error."""
    from tokenprune.plugins import registry
    from tokenprune.plugins.entries import KINDS

    if plugins and models:
        raise OptionError("both --plugins and --models found, expected one of them")
    if plugins:
        _print_plugins(registry.plugins(), output)
        return
    if models:
        _print_models(output)
        return
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
        found["collisions"] = registry.collisions()
        say_json(json.dumps(found, indent=2, ensure_ascii=False))
        return

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    is_narrow = console.width < NARROW
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "what it is") if is_narrow else ("kind", "name", "package", "what it is"):
        table.add_column(heading, style={"kind": "dim", "name": "bold"}.get(heading), overflow="fold")
    _keep_whole(table.columns[0 if is_narrow else 1], [name for entries in kinds.values() for name in entries], console)
    for kind, entries in kinds.items():
        for e in entries.values():
            noun, package = KINDS[kind].noun, f"{e.distribution} {e.version}".rstrip()
            text = f"{noun} of {package}: {e.summary}" if e.summary else f"{noun} of {package}"
            cells = (e.name, text) if is_narrow else (noun, e.name, package, e.summary)
            table.add_row(*map(escape, cells))
        if entries:
            table.add_section()
    console.print(table)
    for label, problem in [("broken", b.error) for b in broken] + [("collides", p) for p in registry.collisions()]:
        console.print(f"[red]{label}[/red]: {escape(problem)}", highlight=False)


def _print_plugins(plugins: list[PluginStatus], output: Format) -> None:
    if output is Format.json:
        import json
        from dataclasses import asdict

        say_json(json.dumps([asdict(plugin) for plugin in plugins], indent=2, ensure_ascii=False))
        return

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tokenprune.plugins.entries import KINDS

    console = Console()
    is_narrow = console.width < NARROW
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("plugin", style="bold", overflow="fold")
    for heading in ("what it is",) if is_narrow else ("package", "origin", "hooks", "status", "registers"):
        table.add_column(heading, overflow="fold")
    _keep_whole(table.columns[0], [plugin.name for plugin in plugins], console)
    colours = {"works": "green", "left out": "dim"}
    for plugin in plugins:
        colour = colours.get(plugin.status, "red")
        counts = [_count(len(names), KINDS[kind].noun) for kind, names in plugin.registers.items()]
        package = escape(f"{plugin.distribution} {plugin.version}".rstrip())
        hooks = f"hooks {plugin.hook_api}" if is_narrow and plugin.hook_api else plugin.hook_api
        cells = [package, plugin.origin, hooks, f"[{colour}]{plugin.status}[/{colour}]", ", ".join(counts)]
        table.add_row(escape(plugin.name), *([", ".join(filter(None, cells))] if is_narrow else cells))
    console.print(table)
    for plugin in plugins:
        if plugin.error:  # below the table, in full
            colour = colours.get(plugin.status, "red")
            console.print(f"[{colour}]{plugin.status}[/{colour}]: {escape(plugin.error)}", highlight=False)


def _print_models(output: Format) -> None:
    from tokenprune.loading.model_support import supported_models

    models = supported_models()
    if output is Format.json:
        import json
        from dataclasses import asdict

        say_json(json.dumps([asdict(model) for model in models], indent=2, ensure_ascii=False))
        return

    from collections import Counter

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("model_type", "status", "reason"):
        table.add_column(heading, style={"model_type": "bold"}.get(heading), overflow="fold")
    _keep_whole(table.columns[0], [model.model_type for model in models], console)
    colours = {"supported": "green", "limited": "yellow", "refused": "red"}
    for model in models:
        status = f"[{colours[model.status]}]{model.status}[/{colours[model.status]}]"
        table.add_row(escape(model.model_type), status, escape(model.reason))
    console.print(table)
    counts = Counter(model.status for model in models)
    console.print(", ".join(f"{counts[status]} {status}" for status in colours), highlight=False)


def _keep_whole(column: Column, names: list[str], console: Console) -> None:
    """Make a column as wide as its names, as far as the others still have space."""
    column.min_width = min(max(map(len, names), default=1), max(console.width - 24, 8))


def _count(number: int, noun: str) -> str:
    many = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else many}"
