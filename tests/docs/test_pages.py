"""README and docs: Python blocks run and print what the page says, commands and option tables are right."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa, write_tower
from PIL import Image
from pixellm_checkpoints import write_pixellm
from sa2va_checkpoints import write_sa2va
from vlm_checkpoints import HUB, VIDEO_PROCESSORS, write_vlm
from vlm_families import FAMILIES as TINY
from vlm_processors import PROCESSORS

import tokenprune
from tokenprune.cli.app import app, main
from tokenprune.plugins import hookspecs, registry
from tokenprune_adapters.hf import FAMILIES, TransformersAdapter

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BUNDLED = "lisa-tiny"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "([^":]+):(\w+)"$', re.MULTILINE)
OPTIONS = re.compile(r"^<!-- options: (\S+) -->\n+((?:\|[^\n]*\n)+)", re.MULTILINE)
CONTINUES = re.compile(r"^<!-- continues: (\S+) -->$", re.MULTILINE)
INLINE_COMMAND = re.compile(r"`(tokenprune(?: [^`\n]+)?)`")
DOTTED = re.compile(r"\b(?:tp|tokenprune(?:_strategies|_adapters)?)(?:\.[A-Za-z_]\w*)+\b(?![./])")
OURS = re.compile(r"(?:tokenprune|strategies|adapters|tools|benchmarks|examples|docs)/[\w./-]+")
NEEDS_NO_MODEL = ("list", "flops")


@dataclass
class Block:
    """A fenced block, and the text block right behind it if there is one: what it prints."""

    language: str
    text: str
    line: int
    printed: str | None = None

    @property
    def lines(self) -> list[str]:
        """Lines, those ending in a backslash joined to the next."""
        return self.text.replace("\\\n", " ").splitlines()


@dataclass
class Page:
    """What running the blocks of a page gave."""

    path: Path
    ran: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)


def source(path: Path) -> str:
    """The page with the snippets that it includes from other files."""

    def included(found: re.Match[str]) -> str:
        text, name = (ROOT / found[1]).read_text(encoding="utf-8"), re.escape(found[2])
        match = re.search(rf"\[start:{name}\][^\n]*\n(.*?)[^\n]*\[end:{name}\]", text, re.DOTALL)
        assert match is not None, f"{path}: {found[0]} includes nothing"
        return match[1]

    return SNIPPET.sub(included, path.read_text(encoding="utf-8"))


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = source(path)
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        block = Block(match[1], match[2], text[: match.start()].count("\n") + 2)
        if block.language == "text" and found and not text[end : match.start()].strip():
            found[-1].printed = block.text
        found.append(block)
        end = match.end()
    return found


def earlier(path: Path) -> list[Block]:
    """All fenced blocks of the pages that a page goes on from, in order."""
    found = CONTINUES.search(source(path))
    if found is None:
        return []
    before = path.parent / found[1]
    return [*earlier(before), *blocks(before)]


def test_every_page_is_found() -> None:
    assert {"README.md", "index.md", "concepts.md", "counting.md", "cli.md", "lisa.md"} <= {page.name for page in PAGES}
    for path in PAGES:
        assert path.read_text(encoding="utf-8").count("```") == 2 * len(FENCE.findall(path.read_text(encoding="utf-8")))


# Python blocks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that examples name: a photo, and checkpoints of tiny size with their towers."""
    folder = tmp_path_factory.mktemp("examples")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    write_lisa(folder / "LISA-7B", tower=False)
    write_tower(folder / "clip-vit-large-patch14")
    write_glamm(folder / "GLaMM-FullScope", tower=False)
    write_tower(folder / "clip-vit-large-patch14-336")
    write_pixellm(folder / "PixelLM-7B")
    write_sa2va(folder / "Sa2VA-4B")
    return folder


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before, gradients = of_this_process(), torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(gradients)
    for name in of_this_process() - before:
        registry.unregister_plugin(name)


def of_this_process() -> set[str]:
    """Names of the plugins that were registered without a package."""
    return {plugin.name for plugin in registry.plugins() if plugin.origin == "this process"}


def bundled_weights() -> Path | None:
    """The folder of the bundled model, if its weights are there."""
    folder = Path(registry.models()[BUNDLED].load()())
    return folder if any(folder.glob("*.safetensors")) else None


def names_in(text: str, context: type[ast.expr_context]) -> set[str]:
    """Names that a block reads or assigns."""
    tree = ast.parse(text)
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    return found - set(dir(builtins))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for name, hub_id in HUB.items():
        if f'"{hub_id}"' in source(path) and not (files / hub_id).is_dir():
            write_vlm(files / hub_id, name)
    weights = bundled_weights()
    module = types.ModuleType("page")
    module.__dict__["image"] = Image.open(files / "photo.png")
    page, unknown = Page(path), set[str]()
    for block in (b for b in earlier(path) if b.language == "python"):
        run_python(block, module.__dict__, f"before {path.relative_to(ROOT)}, line {block.line}")
    for block in (b for b in blocks(path) if b.language == "python"):
        where = f"{path.relative_to(ROOT)}, line {block.line}"
        if weights is None and (BUNDLED in block.text or names_in(block.text, ast.Load) & unknown):
            page.left_out.append(block.line)
            unknown |= names_in(block.text, ast.Store)
            continue
        printed = run_python(block, module.__dict__, where)
        page.ran.append(block.line)
        if block.printed is not None:
            assert plain(printed) == plain(block.printed), f"{where} prints something else"
    if page.left_out:
        pytest.skip(
            f"{path.relative_to(ROOT)}: blocks at lines {page.left_out} need the weights of {BUNDLED}, which are not "
            f"there; those at {page.ran} ran"
        )


def run_python(block: Block, namespace: dict[str, Any], where: str) -> str:
    """Run a block; what it printed. A failure names the page."""
    code = compile("\n" * (block.line - 1) + block.text, where, "exec", dont_inherit=True)
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def plain(text: str) -> list[str]:
    """Lines without white space at their ends, empty ones at both ends left out."""
    return [line.rstrip() for line in text.strip("\n").splitlines()]


# commands ------------------------------------------------------------------------------------------------------------


def commands(line: str) -> Iterator[list[str]]:
    """The tokenprune commands in a shell line, as words after the program's name."""
    words: list[str] | None = None
    for word in [*shlex.split(line, comments=True), ";"]:
        if word in ("&&", "||", "|", ";"):
            if words is not None:
                yield words
            words = None
        elif words is not None:
            words.append(word)
        elif Path(word).name == "tokenprune":
            words = []


def written_commands() -> Iterator[tuple[str, list[str], str | None]]:
    """(where, words, what it prints or None) of every command in bash blocks and in inline code."""
    for path in PAGES:
        for block in blocks(path):
            if block.language == "bash":
                for line in block.lines:
                    for words in commands(line):
                        yield f"{path.relative_to(ROOT)}, line {block.line}: {line.strip()}", words, block.printed
        for match in INLINE_COMMAND.finditer(FENCE.sub("", source(path))):
            for words in commands(match[1]):
                yield f"{path.relative_to(ROOT)}: {match[0]}", words, None


COMMANDS = list(written_commands())


@pytest.mark.parametrize(("where", "words", "printed"), COMMANDS, ids=[where for where, _, _ in COMMANDS])
def test_commands_are_right(
    where: str, words: list[str], printed: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    parse(list(words))
    if words and words[0] in NEEDS_NO_MODEL and "--help" not in words:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        with pytest.raises(SystemExit) as done:
            main(list(words))
        assert not done.value.code
        out = capsys.readouterr().out
        if printed is not None:
            assert plain(out) == plain(printed), f"{where} prints something else:\n{out}"


@functools.cache
def program() -> Any:
    """The whole command."""
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Raise where the command or an option does not exist, or a value has the wrong type."""
    group = program()
    if not words:
        return  # the program's name alone
    if "--help" in words:
        words = [word for word in words if word != "--help"]
        assert words[0] in group.commands
        return
    context = group.make_context("tokenprune", [word for word in words if word != "--debug"])
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else list(context.args)
        name, group, arguments = group.resolve_command(context, rest)
        context = group.make_context(name, arguments, parent=context)


def test_a_wrong_command_would_be_found() -> None:
    parse(["flops", "--strategy", "fastv", "-o", "layer=2"])
    for wrong in (
        ["flop"],
        ["flops", "--strategies", "fastv"],
        ["flops", "--budget", "much"],
        ["segment", "a.png"],
        ["new", "plan", "x"],
    ):
        with pytest.raises(Exception, match=r".+") as caught:
            parse(wrong)
        assert "UsageError" in {kind.__name__ for kind in type(caught.value).__mro__}


# option tables and sources -------------------------------------------------------------------------------------------


def option_table(name: str) -> str:
    """The table of the options of a strategy, or of "datasets/NAME", from the fields themselves."""
    group, _, name = name.rpartition("/")
    kind: Any = registry.get(group or "strategies", name).load()
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for option, about in kind.Options.model_fields.items():
        meaning = str(about.description).replace("|", r"\|")
        rows.append(f"| `{option}` | `{about.default!r}` | {meaning} |")
    return "\n".join(rows)


TABLES = [(path, match[1], match[2]) for path in PAGES for match in OPTIONS.finditer(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("path", "name", "table"), TABLES, ids=[f"{path.name}-{name}" for path, name, _ in TABLES])
def test_option_tables_are_the_fields(path: Path, name: str, table: str) -> None:
    expected = option_table(name)
    assert table.strip() == expected, f"{path.relative_to(ROOT)}: the table of {name!r} should be\n{expected}"


def test_the_drawn_stages_are_what_strategies_declare() -> None:
    shape = tokenprune.Shape(layers=12, image_tokens=256)
    counts = {}
    for name in ("fastv", "prumerge+", "csp"):
        stages = tokenprune.strategy(name, budget=0.35).bind(shape).stages(shape)
        counts[name] = [stage.tokens for stage in stages]
    (fastv,), (plus,), (few, every, kept) = counts.values()
    text = f"256 then {fastv} for fastv; {plus} for prumerge+; {few}, {every}, then {kept} for csp"
    found = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert text in found, "draw the figure anew with tools/figures/stages.py, and correct the text that describes it"


def test_every_builtin_strategy_has_a_page() -> None:
    documented = "\n".join(source(path) for path in (ROOT / "docs" / "methods").glob("*.md"))
    for name, entry in registry.strategies().items():
        if entry.distribution == "tokenprune-vlm":
            assert f"`{name}`" in documented, f"no page under docs/methods names {name!r}"


def test_every_builtin_dataset_is_on_the_page_of_datasets() -> None:
    page = source(ROOT / "docs" / "datasets.md")
    for name, entry in registry.datasets().items():
        if entry.distribution == "tokenprune-vlm":
            assert re.search(rf"^\|[^|]*`{re.escape(name)}`", page, re.MULTILINE), f"no row of a table names {name!r}"


def test_the_table_of_families_is_what_the_adapter_knows() -> None:
    page = source(ROOT / "docs" / "models" / "transformers.md")
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \| (yes|no) \| (yes|no) \|", page, re.MULTILINE)
    expected = []
    for kind, family in FAMILIES.items():
        binding = TransformersAdapter.bind(TINY[kind].build())
        assert binding is not None
        offers = tokenprune.ClsAttention in binding.offers(), family.videos is not None
        expected.append((family.title, kind, *("yes" if offered else "no" for offered in offers)))
    assert rows == expected


@pytest.mark.parametrize("kind", [kind for kind in HUB if kind not in PROCESSORS])
def test_every_family_has_an_example_of_five_lines(kind: str) -> None:
    text = f'"{HUB[kind]}"'
    page = [block.text for block in blocks(ROOT / "docs" / "models" / "transformers.md")]
    found = [block for block in page if text in block and "tp.prune(model" in block]
    code = [line for line in found[0].splitlines() if line and "import" not in line and not line.startswith("print")]
    assert len(code) <= 5
    assert "tp.prune(model" in code[-2]
    assert ("AutoProcessor" in found[0]) == (kind not in VIDEO_PROCESSORS)


def test_checkpoints_of_further_families_are_named() -> None:
    page = source(ROOT / "docs" / "models" / "transformers.md")
    assert [one.hub for one in PROCESSORS.values() if one.hub and f"`{one.hub}`" not in page] == []
    row = next(line for line in page.splitlines() if line.endswith("their processors need torchvision |"))
    assert re.findall("`(.*?)`", row) == [one.hub for one in PROCESSORS.values() if one.torchvision]


def test_every_hook_has_its_place_in_the_guide() -> None:
    pages = [source(ROOT / "docs" / page) for page in ("plugins.md", "extend/observers.md")]
    for name in vars(hookspecs):
        if name.startswith("tokenprune_"):
            page = pages[not name.startswith("tokenprune_register_")]
            assert re.search(rf"^\|.*`{name}`.*\|$", page, re.MULTILINE), f"no row of a table names {name}"


def test_modules_named_in_the_reference_exist() -> None:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    named = [name for page in pages for name in re.findall(r"^::: (\S+)$", source(page), re.MULTILINE)]
    assert len(named) > len(pages)
    for name in named:
        importlib.import_module(name)


def resolved(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    parts = name.replace("tp.", "tokenprune.", 1).split(".") if name.startswith("tp.") else name.split(".")
    for end in range(len(parts), 0, -1):
        with suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found is not None
    return False


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_and_files_in_the_text_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"#(tokenprune[.\w]+)\)", text)
    wrong = [name for words in code for name in DOTTED.findall(words) if not resolved(name)]
    wrong += [name for name in code if OURS.fullmatch(name) and not (ROOT / name).exists()]
    assert not wrong, f"{path.relative_to(ROOT)} names {wrong}, which do not exist"


def test_a_name_that_does_not_exist_would_be_found() -> None:
    assert resolved("tp.prune")
    assert resolved("tokenprune_adapters.segmentation.segmenter.Segmenter")
    assert not resolved("tokenprune.core.strategy.Strategies")
    assert not resolved("tokenprune.cores")


def test_result_tables_are_those_of_the_stored_comparisons() -> None:
    script = ROOT / "tools" / "figures" / "results.py"
    found = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
