"""Which plugins load: versions of the hooks, TOKENPRUNE_PLUGINS, and what `tokenprune list --plugins` says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_packages import install, registering, searched

from tokenprune import hookimpl
from tokenprune.cli.app import main
from tokenprune.errors import PluginError
from tokenprune.plugins import hookspecs, registry
from tokenprune.plugins.entries import COMMANDS, KINDS, LIMIT


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched for installed packages."""
    monkeypatch.delenv(LIMIT, raising=False)
    with searched(tmp_path):
        yield tmp_path


def statuses() -> dict[str, tuple[str, str]]:
    return {plugin.distribution: (plugin.origin, plugin.status) for plugin in registry.plugins()}


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["list", "--plugins", *options])
    assert not done.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("version", ["1", "1.0", "1.0.7", None])
def test_plugins_of_this_major_version_load(site: Path, version: str | None) -> None:
    install(site, "a-pack", registering("a", **({"tokenprune_hook_api": version} if version else {})))
    assert "a" in registry.strategies()
    (status,) = [plugin for plugin in registry.plugins() if plugin.distribution == "a-pack"]
    assert (status.status, status.hook_api, status.registers) == ("works", version or "1.0", {"strategies": ["a"]})


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (
            "2.0",
            "it is built for version 2.0 of the plugin hooks, this tokenprune has 1.0.0; install compatible releases",
        ),
        ("0.9", "built for version 0.9"),
        ("1.99", "built for version 1.99"),
        ("latest", "tokenprune_hook_api = 'latest' found, expected a version such as '1.0.0'"),
    ],
)
def test_plugins_of_another_version_are_refused(site: Path, version: str, problem: str) -> None:
    install(site, "a-pack", registering("a", tokenprune_hook_api=version))
    install(site, "b-pack", registering("b"))
    assert "a" not in registry.strategies()
    assert "b" in registry.strategies()
    (broken,) = registry.broken_plugins()
    assert broken.error.startswith("plugin 'plug' of package 'a-pack': ")
    assert problem in broken.error
    assert statuses() == {
        "tokenprune-vlm": ("built-in", "works"),
        "a-pack": ("installed", "broken"),
        "b-pack": ("installed", "works"),
    }


def test_hooks_that_do_not_exist_and_plugins_without_hooks_are_refused(site: Path) -> None:
    source = registering("a").replace("register_strategies", "register_strategys")
    install(site, "a-pack", source)
    install(site, "b-pack", "number = 3\n")
    install(site, "c-pack", registering("a").replace("(register)", "(registry)"))
    errors = {broken.distribution: broken.error for broken in registry.broken_plugins()}
    assert "no hook tokenprune_register_strategys; did you mean tokenprune_register_strategies?" in errors["a-pack"]
    assert "no hook found in the module 'b_pack'; mark its functions with @tokenprune.hookimpl" in errors["b-pack"]
    assert "its hook tokenprune_register_strategies takes registry; expected some of: register" in errors["c-pack"]
    assert "fastv" in registry.strategies()


@pytest.mark.parametrize(
    ("limit", "loaded"),
    [
        ("a-pack", {"a"}),
        ("A_Pack, c-pack", {"a", "c"}),
        ("", set()),
        ("plug", {"a", "b", "c"}),
        (None, {"a", "b", "c"}),
    ],
)
def test_the_environment_limits_loading(
    site: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, loaded: set[str]
) -> None:
    for letter in "abc":
        install(site, f"{letter}-pack", registering(letter))
    if limit is not None:
        monkeypatch.setenv(LIMIT, limit)
    names = set(registry.strategies())
    assert names & {"a", "b", "c"} == loaded
    assert "fastv" in names
    left_out = {distribution[0] for distribution, told in statuses().items() if told == ("installed", "left out")}
    assert left_out == {"a", "b", "c"} - loaded
    assert registry.broken_plugins() == []


def test_a_plugin_that_is_left_out_is_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "a-pack", "raise KeyboardInterrupt")  # nothing would hold this back
    monkeypatch.setenv(LIMIT, "b-pack")
    assert "fastv" in registry.strategies()
    (unknown,) = registry.broken_plugins()
    assert (unknown.name, unknown.distribution) == ("b-pack", LIMIT)
    assert unknown.error == "no plugin and no package is named 'b-pack'; installed packages with plugins: a-pack"


def test_list_shows_origin_version_and_status(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for letter, source in {"a": registering("a"), "b": "import surely_not_installed", "c": registering("c")}.items():
        install(site, f"{letter}-pack", source, version=f"1.{ord(letter)}")
    install(site, "d-pack", registering("c", target="other:Thing"))
    monkeypatch.setenv(LIMIT, "a-pack,b-pack,c-pack,d-pack")
    install(site, "e-pack", registering("e"))
    told: list[dict[str, Any]] = json.loads(listed(capsys, "--format", "json"))
    assert {(p["distribution"], p["version"], p["status"]) for p in told if p["origin"] == "installed"} == {
        ("a-pack", "1.97", "works"),
        ("b-pack", "1.98", "broken"),
        ("c-pack", "1.99", "collides"),
        ("d-pack", "1.2", "collides"),
        ("e-pack", "1.2", "left out"),
    }
    table = listed(capsys)
    for text in (
        "built-in",
        "a-pack 1.97",
        "1 strategy",
        "No module named 'surely_not_installed'",
        "'c-pack' and 'd-pack'",
    ):
        assert text in table
    with pytest.raises(SystemExit):
        main(["list"])
    assert "strategy 'c' is registered by two packages, 'c-pack' and 'd-pack'" in capsys.readouterr().out


def test_what_is_not_of_its_kind_is_named_on_first_use() -> None:
    class Junk:
        @hookimpl
        def tokenprune_register_strategies(self, register: Any) -> None:
            register("junk", dict)

    registry.register_plugin(Junk(), name="mine")
    try:
        expected = "expected a subclass of tokenprune.core.strategy.Strategy"
        problem = f"plugin 'mine' of package 'mine': strategy 'junk' is dict, {expected}"
        with pytest.raises(PluginError, match=problem):
            registry.get("strategies", "junk").load()
    finally:
        registry.reset()


def test_names_of_own_commands_cannot_be_taken() -> None:
    class Mine:
        @hookimpl
        def tokenprune_register_commands(self, register: Any) -> None:
            register("compare", print)

    with pytest.raises(PluginError, match="the command 'compare' is tokenprune's own; choose another name"):
        registry.register_plugin(Mine(), name="mine")
    from tokenprune.cli.app import app

    assert {command.name for command in app.registered_commands} | {g.name for g in app.registered_groups} <= COMMANDS


def test_every_kind_has_a_documented_hook() -> None:
    for kind, about in KINDS.items():
        assert about.hook == f"tokenprune_register_{kind}"
        assert getattr(hookspecs, about.hook).__doc__
    assert hookspecs.HOOK_API.count(".") == 2


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--plugins"], ["list", "--format", "json"]])
def test_help_and_list_import_nothing_heavy(words: list[str]) -> None:
    code = (
        f"import sys\nfrom tokenprune.cli.app import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'matplotlib', 'PIL', 'jinja2'}\n"
        "print(sorted((heavy | {'tokenprune.core.strategy'}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
