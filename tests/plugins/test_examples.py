"""The example plugins: complete packages, as short as the docs say, that need nothing but the core.

`.ci/examples.sh` installs them and runs their own tests.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads pyproject.toml only with the package tomli")

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("examples/plugins/*/pyproject.toml"))
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)


def code_lines(path: Path) -> int:
    """Lines that hold code: none that are blank, or hold nothing but a comment or a docstring."""
    source = path.read_text()
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def package_lines(plugin: Path) -> int:
    return sum(code_lines(path) for path in plugin.glob("src/*/*.py"))


def test_code_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    comments = '"""Two\nlines."""\n\n# comment\n'
    path.write_text(comments + 'x = (1,\n     2)  # two\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n')
    assert code_lines(path) == 5


def test_there_are_six() -> None:
    names = [plugin.name.removeprefix("tokenprune-") for plugin in PLUGINS]
    assert names == ["decision-log", "internvl-chat", "lmms-eval", "second-look", "spread", "voxtral"]


def test_the_strategy_has_forty_lines_at_most() -> None:
    """Of the whole package, registration included."""
    assert package_lines(ROOT / "examples/plugins/tokenprune-spread") <= 40


@each_plugin
def test_the_docs_say_how_long_it_is(plugin: Path) -> None:
    page = (ROOT / "docs/plugins.md").read_text()
    found = re.search(rf"^\| `{plugin.name}` \|[^|]*\| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert found is not None, f"docs/plugins.md has no row for {plugin.name}"
    assert int(found[1]) == package_lines(plugin)
    assert int(found[2]) == sum(code_lines(path) for path in plugin.glob("tests/*.py"))


@each_plugin
def test_its_pyproject_is_complete(plugin: Path) -> None:
    project = tomllib.loads((plugin / "pyproject.toml").read_text())
    about = project["project"]
    assert about["name"] == plugin.name
    assert any(re.match(r"tokenprune\b", requirement) for requirement in about["dependencies"])
    assert (plugin / about["readme"]).is_file()
    assert all((plugin / file).is_file() for file in about["license-files"])
    for module in about["entry-points"]["tokenprune"].values():
        assert (plugin / "src" / (module.replace(".", "/") + ".py")).is_file()
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (plugin / package / "__init__.py").is_file()
    assert list(plugin.glob("tests/test_*.py"))


@each_plugin
def test_it_needs_nothing_but_the_core(plugin: Path) -> None:
    names = {
        name
        for path in plugin.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not [name for name in names if name.split(".")[0] in ("tokenprune_strategies", "tokenprune_adapters")]
    assert not [name for name in names if name.startswith("tokenprune.") and "._" in name]


@each_plugin
def test_listing_it_imports_nothing_heavy(plugin: Path) -> None:
    (package,) = (path.parent.name for path in plugin.glob("src/*/plugin.py"))
    code = f"import sys, {package}.plugin; assert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": f"{plugin / 'src'}:{ROOT}"})
