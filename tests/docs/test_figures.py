"""Figures of the docs: the stored ones are what their scripts draw today."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tokenprune.plugins import registry

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tools" / "figures"
STORED = ROOT / "docs" / "images" / "concepts"


@pytest.fixture
def concepts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that draws the figures of the page on concepts."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("concepts")


def behind(picture: Path) -> tuple[str, Any]:
    """What drew an SVG, and the numbers that it says it shows."""
    found = {node.tag.rpartition("}")[2]: node for node in ElementTree.parse(picture).iter()}
    return "".join(found["creator"].itertext()).strip(), json.loads(found["description"].text or "")


def test_the_figures_on_concepts_are_what_their_script_draws(concepts: Any, tmp_path: Path) -> None:
    concepts.main(tmp_path)
    assert {path.name for path in STORED.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for drawn in tmp_path.iterdir():
        stored = STORED / drawn.name
        (program, numbers), (program_then, numbers_then) = behind(drawn), behind(stored)
        assert numbers == numbers_then, f"{drawn.name} shows other numbers; run tools/figures/concepts.py"
        if program == program_then:
            same = drawn.read_bytes() == stored.read_bytes()
            assert same, f"{drawn.name} looks different; run tools/figures/concepts.py"


def test_the_page_tells_what_the_figures_on_concepts_show(concepts: Any) -> None:
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    told = {name: text for text, name in re.findall(r"!\[([^\]]+)\]\(images/concepts/(\w+)\.svg\)", page)}
    assert set(told) == set(concepts.FIGURES)
    shown = {name: behind(STORED / f"{name}.svg")[1] for name in told}

    merged = shown["merged"]
    masses = [merged["mass"][token] for token in sorted(merged["mass"], key=int)]
    assert f"the {len(masses)} tokens left, with masses {listed(masses)}," in told["merged"]
    assert all(merged["content"][token] == merged["content"][into] for token, into in enumerate(merged["into"]))
    first, _, last = (
        [n for n, fate in enumerate(shown["stages"]["fates"][layer]) if fate == "a"] for layer in (0, 2, 4)
    )
    assert f"tokens {listed(first[:-1])} and {first[-1]} active, the others parked" in told["stages"]
    assert f"tokens {listed(last[:-1])} and {last[-1]} active, the others dropped" in told["stages"]
    for name, counts in shown["budgets"]["counts"].items():
        described = re.search(rf"{re.escape(name)}: [^.]+(\.\d)?", told["budgets"])
        assert described is not None
        assert {str(count) for count in counts} <= set(re.findall(r"\d+", described[0]))
        mean = f"{sum(counts) / len(counts):.1f}".removesuffix(".0")
        assert len(set(counts)) == 1 or described[0].endswith(f"mean {mean}")
    assert f"have positions {listed(shown['positions']['keep'][1])};" in told["positions"]
    for key in ("prefill", "generated", "generated reported"):
        assert {str(count) for count in shown["caches"][key]} <= set(re.findall(r"\d+", told["caches"]))


def listed(numbers: list[float]) -> str:
    """As in a sentence."""
    return ", ".join(f"{number:g}" for number in numbers)


def test_the_figure_of_break_even_points_shows_the_stored_measurements(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script: Any = importlib.import_module("break_even")
    stored, drawn = ROOT / "docs" / "images" / "break-even.svg", tmp_path / "break-even.svg"
    script.main(drawn)
    numbers = behind(stored)[1]
    assert numbers == behind(drawn)[1], "run tools/figures/break_even.py"
    for name, rows in numbers.items():
        timings = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))["timings"]
        for timing in timings:
            ratio, what = rows[timing["strategy"]][str(timing["image_tokens"])]
            assert abs(ratio - timing["ratio"]) <= 0.005
            assert (what == "pays") == timing["pays"]
            assert (what == "slower") == (timing["ratio_low"] > 1)


@pytest.fixture(scope="module")
def hero() -> Iterator[tuple[Any, list[Any], str]]:
    """The script of the figure on the home page, and its run."""
    if not any(Path(registry.models()["lisa-tiny"].load()()).glob("*.safetensors")):
        pytest.skip("the weights of lisa-tiny are not there")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        script: Any = importlib.import_module("hero")
        yield script, *script.run()


def test_the_figure_on_the_home_page_is_of_a_run_of_today(hero: tuple[Any, list[Any], str], tmp_path: Path) -> None:
    script, found, about = hero
    for page, text in ((script.PAGE, script.figures(found, about)), (script.README, script.columns(found, about))):
        assert text in page.read_text(encoding="utf-8"), f"{page.name}: other captions; run tools/figures/hero.py"
    script.draw(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in script.FOLDER.iterdir()}
    for drawn in tmp_path.iterdir():
        now, then = (np.asarray(Image.open(at).convert("RGB"), int) for at in (drawn, script.FOLDER / drawn.name))
        assert now.shape == then.shape
        share = float((abs(now - then).max(-1) > 48).mean())
        assert share < 0.01, f"{drawn.name}: {share:.1%} of the pixels differ; run tools/figures/hero.py"


def test_the_home_page_counts_the_methods_right() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    said = re.search(r"^# .*more than (\d+) visual-token pruning methods", page, re.MULTILINE)
    assert said is not None
    entries = registry.strategies().items()
    built_in = {name for name, entry in entries if entry.distribution == "tokenprune-vlm"}
    methods = built_in - {"none", "blind", "random", "uniform", "csp-65", "csp-70"}  # baselines, presets
    assert len(methods) > int(said[1])
