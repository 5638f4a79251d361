"""The plugin directory lists every example plugin, with what it registers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tokenprune.plugins import hookspecs

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads pyproject.toml only with the package tomli")

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path for path in (ROOT / "examples" / "plugins").iterdir() if path.is_dir())
PAGE = (ROOT / "docs" / "plugin-directory.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w-]+)` \| (.+?) \((`.+`)\) \| ([\w.-]+) \|$", PAGE, re.MULTILINE)


def test_the_table_has_every_example_in_order() -> None:
    names = [name for name, *_ in ROWS]
    assert names == sorted(names)
    examples = [path.name for path in PLUGINS]
    assert examples == [name for name in names if name in examples]


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_row_says_what_the_package_says(plugin: Path) -> None:
    about = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (row,) = [row for row in ROWS if row[0] == plugin.name]
    _, adds, hooks, licence = row
    (path,) = plugin.glob("src/*/plugin.py")
    source = path.read_text(encoding="utf-8")
    assert re.findall(r"`(\w+)`", hooks) == re.findall(r"^def tokenprune_(\w+)\(", source, re.MULTILINE)
    for name in re.findall(r'register\(\s*"([^"]+)"', source):
        assert f"`{name}`" in adds, f"the row of {plugin.name} does not name {name}"
    assert licence == about["license"]


def test_every_hook_in_the_table_exists() -> None:
    assert all(hasattr(hookspecs, f"tokenprune_{hook}") for row in ROWS for hook in re.findall(r"`(\w+)`", row[2]))
