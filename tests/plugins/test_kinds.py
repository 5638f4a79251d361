"""Metrics, segmenters, report sections and commands of plugins, from registering them to what users see."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from fake_segmentation import FakeData, FakeModel
from plugin_packages import install, registering, searched

from tokenprune import compare, hookimpl
from tokenprune.cli.app import main
from tokenprune.errors import InputError, PluginError, UnknownNameError
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.evaluation.comparison.tables import as_text
from tokenprune.evaluation.measured import Measured
from tokenprune.plugins import registry
from tokenprune.report.write import write_comparison
from tokenprune_strategies.csp.instance_masks import segment

Add = Callable[..., None]


@pytest.fixture
def plugin() -> Iterator[Add]:
    """`plugin(metrics={"name": target})` registers things for the length of a test."""
    registry.reset()
    number = iter(range(9))

    def add(**kinds: dict[str, Any]) -> None:
        class Made:
            pass

        made = Made()
        for kind, things in kinds.items():

            def register_all(register: Any, things: dict[str, Any] = things) -> None:
                for name, target in things.items():
                    register(name, target, summary=f"the {name} of a test")

            setattr(made, f"tokenprune_register_{kind}", hookimpl(lambda register, run=register_all: run(register)))
        registry.register_plugin(made, name=f"mine-{next(number)}")

    yield add
    registry.reset()


def compared(**options: Any) -> Comparison:
    return compare(FakeModel(), FakeData(), ["none", "fastv"], limit=6, timing_samples=0, records=1, **options)


# metrics -------------------------------------------------------------------------------------------------------------


def area(measured: Measured) -> float:
    return float(measured.mask.mean())


def only_attributes(measured: Measured) -> float | None:
    return 2.0 if measured.query.kind == "short" else None


def test_metrics_are_in_table_and_json(plugin: Add) -> None:
    seen: list[Measured] = []

    def watch(measured: Measured) -> np.float32:
        seen.append(measured)
        return np.float32(0.25)

    plugin(metrics={"area": area, "attributes": only_attributes, "undefined": lambda measured: None, "watch": watch})
    found = compared()
    assert len(seen) == 2 * 6
    labels = list(dict.fromkeys(measured.strategy for measured in seen))
    assert [label.split()[0] for label in labels] == ["none", "fastv"]
    for measured in seen:
        assert measured.mask.shape == measured.target.shape == measured.untouched.shape
        assert measured.row < len(measured.trace.exists)
        assert measured.query.text
    for row, name in zip(found.rows, labels, strict=True):
        masks = [area(measured) for measured in seen if measured.strategy == name]
        assert row.metrics["area"] == pytest.approx(sum(masks) / 6)
        assert (row.metrics["undefined"], row.metrics["watch"]) == (None, 0.25)
        assert row.metrics["attributes"] == 2.0
    assert json.loads(found.to_json())["rows"][1]["metrics"]["watch"] == 0.25
    assert Comparison.model_validate_json(found.to_json()).rows == found.rows
    text = as_text(found.table())
    assert "metrics that plugins add" in text
    assert "0.25" in text


def test_metrics_can_be_chosen(plugin: Add) -> None:
    plugin(metrics={"area": area, "attributes": only_attributes})
    assert list(compared(extra_metrics=["area"]).rows[0].metrics) == ["area"]
    nothing = compared(extra_metrics=[])
    assert nothing.rows[0].metrics == {}
    assert "plugins" not in as_text(nothing.table())
    with pytest.raises(UnknownNameError, match="unknown metric 'aera'; did you mean 'area'"):
        compared(extra_metrics=["aera"])


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        (lambda measured: 1 / 0, "metric 'bad' failed with ZeroDivisionError: division by zero; fix or uninstall it"),
        (lambda measured: float("nan"), "metric 'bad' gave nan for query"),
        (lambda measured: "much", "metric 'bad' gave 'much' for query"),
        (lambda measured: [1, 2], r"metric 'bad' gave \[1, 2\] for query .* expected a finite number or None"),
        ("not_there:bad", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_metric_that_misbehaves_is_named(plugin: Add, metric: Any, problem: str) -> None:
    plugin(metrics={"bad": metric})
    with pytest.raises(PluginError, match="plugin 'mine-0' of package 'mine-0': .*" + problem):
        compared()
    assert compared(extra_metrics=[]).samples == 6


# segmenters ----------------------------------------------------------------------------------------------------------


def test_segmenters_are_found_by_name(plugin: Add, tmp_path: Path) -> None:
    image = np.zeros((8, 6, 3), dtype=np.uint8)
    upper = np.zeros((1, 8, 6), dtype=bool)
    upper[0, :4] = True
    plugin(segmenters={"halves": lambda picture: upper, "flat": lambda picture: upper[0], "text": lambda picture: "no"})
    assert segment("halves", image).numpy().tolist() == upper.tolist()
    with pytest.raises(
        InputError, match=r"segmenter 'flat': found masks of shape \[8, 6\], expected masks \[n, 8, 6\]"
    ):
        segment("flat", image)
    with pytest.raises(InputError, match="segmenter 'text': found str"):
        segment("text", image)
    plugin(segmenters={"broken": lambda picture: 1 / 0})
    with pytest.raises(PluginError, match="'mine-1': segmenter 'broken' failed with ZeroDivisionError"):
        segment("broken", image)


# report sections -----------------------------------------------------------------------------------------------------


def test_report_sections_write_beside_the_rest(plugin: Add, tmp_path: Path) -> None:
    def ranking(comparison: Comparison, folder: Path) -> list[Path]:
        path = folder / "ranking.txt"
        path.write_text("\n".join(row.label for row in sorted(comparison.rows, key=lambda row: -row.giou)))
        return [path]

    plugin(report_sections={"ranking": ranking})
    written = write_comparison(compared(), tmp_path / "out")
    assert written[0].name == "results.json"
    assert written[-1].read_text().split() in (["none", "fastv"], ["fastv", "none"])


def test_a_report_section_that_fails_spoils_nothing_else(plugin: Add, tmp_path: Path) -> None:
    def fine(comparison: Comparison, folder: Path) -> list[Path]:
        (folder / "fine.txt").write_text("fine")
        return [folder / "fine.txt"]

    plugin(report_sections={"bad": lambda comparison, folder: 1 / 0, "fine": fine})
    with pytest.raises(PluginError, match="'mine-0': report section 'bad' failed with ZeroDivisionError"):
        write_comparison(compared(), tmp_path)
    assert {"results.json", "fine.txt"} <= {path.name for path in tmp_path.iterdir()}
    registry.reset()
    plugin(report_sections={"bad": lambda comparison, folder: [folder / "nothing.txt"]})
    with pytest.raises(PluginError, match=r"report section 'bad' gave .*nothing.txt.* expected a list of the files"):
        write_comparison(compared(), tmp_path)


# commands ------------------------------------------------------------------------------------------------------------


def census(number: int = 3, loud: bool = False) -> None:
    """Count."""
    typer.echo("!" * number if loud else str(number))


as_list = typer.Typer()


@as_list.command()
def one() -> None:
    """The first."""
    typer.echo("first")


@as_list.command()
def two() -> None:
    """The second."""
    raise typer.Exit(5)


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as done:
        main(list(words))
    out = capsys.readouterr()
    return done.value.code or 0, out.out, out.err


def test_commands_run_and_are_shown(plugin: Add, capsys: pytest.CaptureFixture[str]) -> None:
    plugin(commands={"census": census, "several": as_list})
    assert ran(capsys, "census", "--number", "4")[:2] == (0, "4\n")
    assert ran(capsys, "census", "--number", "2", "--loud")[:2] == (0, "!!\n")
    assert ran(capsys, "several", "one")[:2] == (0, "first\n")
    assert ran(capsys, "several", "two")[0] == 5
    code, _, errors = ran(capsys, "census", "--number", "many")
    assert code == 2
    assert "invalid value for '--number'" in errors
    text = ran(capsys, "--help")[1]
    assert "the census of a test" in text
    assert text.index("compare") < text.index("census")
    assert "Count." in ran(capsys, "census", "--help")[1]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (lambda: 1 / 0, "command 'bad' failed with ZeroDivisionError: division by zero"),
        ("not_there:bad", "command 'bad' (not_there:bad) cannot be imported: ModuleNotFoundError"),
        ("typer:__version__", "command 'bad' is '"),
    ],
)
def test_a_command_that_misbehaves_is_named(
    plugin: Add, capsys: pytest.CaptureFixture[str], target: Any, problem: str
) -> None:
    plugin(commands={"bad": target, "census": census})
    code, _, errors = ran(capsys, "bad")
    assert code == 2
    assert errors.startswith(f"error: plugin 'mine-0' of package 'mine-0': {problem}")
    assert ran(capsys, "census")[:2] == (0, "3\n")
    assert "the bad of a test" in ran(capsys, "--help")[1]


def test_help_imports_no_command_of_a_plugin(tmp_path: Path) -> None:
    install(tmp_path, "a-pack", registering("census", kind="commands", target="a_census:app"))
    (tmp_path / "a_census.py").write_text("raise SystemExit('imported')")
    with searched(tmp_path):
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tokenprune.cli.app import main; main(['--help'])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "census" in done.stdout
