"""`tokenprune new strategy`, `new adapter` and `new dataset`: a plugin package to begin with."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tokenprune.cli.arguments import path

app = typer.Typer(no_args_is_help=True, help="Write a new plugin package that installs and passes its own tests.")

WHAT = {
    "strategies": "src/{module}/strategy.py: options, reads, score",
    "adapters": "src/{module}/adapter.py: which checkpoints, which decoder, where the image tokens stand",
    "datasets": "src/{module}/dataset.py: where the files are, how queries are read",
}
THEN = {
    "strategies": "tokenprune compare --strategies csp,{name}",
    "adapters": "tokenprune list",
    "datasets": "{environment}=path/to/files tokenprune compare --dataset {name} --limit 20",
}


class Licence(str, Enum):
    """Licences with a text in the templates."""

    apache = "Apache-2.0"
    mit = "MIT"
    bsd = "BSD-3-Clause"
    none = "none"


def _name(example: str) -> Any:
    return typer.Argument(metavar="NAME", help=f"What users will type, as in {example}.", show_default=False)


Into = Annotated[Path, typer.Option(parser=path, help="Folder in which the package's folder is made.")]
LicenceOption = Annotated[
    Licence, typer.Option("--licence", "--license", case_sensitive=False, help="Licence of the package.")
]
Author = Annotated[Optional[str], typer.Option(help='Its author, as in "Ada Lovelace <ada@example.org>".')]  # noqa: UP045
Description = Annotated[str, typer.Option(help="One line on what it is.")]


@app.command("strategy")
def strategy(
    name: Annotated[str, _name("my-method")],
    into: Into = Path("."),
    licence: LicenceOption = Licence.apache,
    author: Author = None,
    description: Description = "",
) -> None:
    """Write a package with a small working strategy, to be replaced by yours."""
    _write("strategies", name, into, licence, author, description)


@app.command("adapter")
def adapter(
    name: Annotated[str, _name("my-model")],
    into: Into = Path("."),
    licence: LicenceOption = Licence.apache,
    author: Author = None,
    description: Description = "",
) -> None:
    """Write a package with a small working adapter for a family of models."""
    _write("adapters", name, into, licence, author, description)


@app.command("dataset")
def dataset(
    name: Annotated[str, _name("my-data")],
    into: Into = Path("."),
    licence: LicenceOption = Licence.apache,
    author: Author = None,
    description: Description = "",
) -> None:
    """Write a package with a small working dataset, which reads images, queries and masks from a folder."""
    _write("datasets", name, into, licence, author, description)


def _write(kind: str, name: str, into: Path, licence: Licence, author: str | None, description: str) -> None:
    import shlex

    from tokenprune.errors import InputError
    from tokenprune.scaffold.naming import check_name
    from tokenprune.scaffold.package import Project, write

    names = check_name(kind, name)
    if author is not None and not author.strip():
        raise InputError("--author is empty; give a name, or leave it out")
    project = Project(names, licence.value, (author or "").strip(), description.strip())
    folder = write(project, into)
    typer.echo(f"wrote {folder}, {len(project.files())} files; begin with")
    typer.echo(f"  {WHAT[kind].format(module=names.module)}")
    typer.echo("install it, test it, use it:")
    for step in (
        f"cd {shlex.quote(str(folder))}",
        'python -m pip install -e ".[test]"',
        "python -m pytest",
        THEN[kind].format(name=names.name, environment=names.environment),
    ):
        typer.echo(f"  {step}")
