"""Installed packages with plugins, made up for tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenprune.plugins import registry


def install(folder: Path, distribution: str, source: str, version: str = "1.2") -> None:
    """Put a package with one entry point `plug` on `folder`, as pip would."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[tokenprune]\nplug = {module}\n")


@contextmanager
def searched(folder: Path) -> Iterator[Path]:
    """While open, packages in the folder are installed ones; their modules are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    registry.reset()
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
        registry.reset()


def registering(
    name: str, *, kind: str = "strategies", target: str = "tokenprune.core.strategy:Strategy", **values: str
) -> str:
    """The source of a plugin module that registers one name; `values` are module attributes."""
    attributes = "".join(f"{key} = {value!r}\n" for key, value in values.items())
    return (
        f"from tokenprune import hookimpl\n\n{attributes}\n"
        f"@hookimpl\ndef tokenprune_register_{kind}(register):\n    register({name!r}, {target!r}, summary='found')\n"
    )
