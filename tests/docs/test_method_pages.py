"""Pages of methods: all have the same sections and pictures; citations have one form and name the page's paper."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))
CITING = [*METHODS, *(DOCS / "models" / f"{name}.md" for name in ("lisa", "glamm", "pixellm", "sa2va"))]
SECTIONS = ["Idea", "On one image", "Options", "The paper's, and ours", "How it was checked", "Citation"]
WITHOUT_PAPER = {"baselines", "compositions", "knorm", "similarity"}  # or whose paper has a page of its own
ENTRY = re.compile(r"^```bibtex\n@(\w+)\{(\w+),\n(.*?)\n\}\n```$", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^  (\w+) *= \{(.*?)\},$", re.MULTILINE | re.DOTALL)


def entries(path: Path) -> list[tuple[str, str, dict[str, str]]]:
    """Kind, key and fields of every entry of a page."""
    text = path.read_text(encoding="utf-8")
    found = ENTRY.findall(text)
    assert len(found) == text.count("```bibtex"), f"{path.name}: an entry of another form"
    return [(kind, key, dict(FIELD.findall(body))) for kind, key, body in found]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_sections_stand_in_order_and_pictures_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures, f"{path.name} has no picture"
    for picture in pictures:
        assert (path.parent / picture).is_file(), f"{path.name}: no file {picture}"


@pytest.mark.parametrize("path", CITING, ids=lambda path: path.stem)
def test_entries_have_one_form_and_are_of_the_paper_that_is_linked(path: Path) -> None:
    found, text = entries(path), path.read_text(encoding="utf-8")
    assert bool(found) != (path.stem in WITHOUT_PAPER)
    for kind, key, fields in found:
        where = "booktitle" if kind == "inproceedings" else "eprint" if "eprint" in fields else "howpublished"
        assert {"title", "author", "year", where} <= set(fields), f"{path.name}: {key} lacks a field"
        surname = fields["author"].split(",")[0].lower()
        assert key.startswith(surname + fields["year"]), f"{path.name}: {key} is not author, year, name"
        assert all(value.count("{") == value.count("}") for value in fields.values())
        assert all(", " in author for author in re.split(r"\s+and\s+", fields["author"]))
        if "eprint" in fields:
            assert f"(https://arxiv.org/abs/{fields['eprint']})" in text.split("\n## ")[0], f"{path.name}: other paper"


def test_keys_are_different() -> None:
    keys = [key for path in CITING for _, key, _ in entries(path)]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
def test_pictures_with_a_text_side_are_redrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "figures"))
    importlib.import_module("clip_stages").main(tmp_path)
    stored = DOCS / "images" / "text-side"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in stored.iterdir()}
    for path in tmp_path.iterdir():
        now, then = (np.asarray(Image.open(at).convert("RGB"), dtype=np.int16) for at in (path, stored / path.name))
        assert now.shape == then.shape
        share = float((abs(now - then).max(-1) > 48).mean())
        assert share < 0.01, f"{path.name}: {share:.1%} of the pixels differ; run tools/figures/clip_stages.py"
