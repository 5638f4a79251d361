"""The pictures on the methods' pages are what `tools/figures/stages.py` draws today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "docs" / "images" / "methods"
OTHER = 0.01  # the share of pixels that other releases of the libraries may draw differently


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


@pytest.mark.slow
def test_pictures_of_methods_are_redrawn(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("stages", ROOT / "tools" / "figures" / "stages.py")
    assert spec is not None
    assert spec.loader is not None
    stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stages)
    stages.methods(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in STORED.iterdir()}
    for path in sorted(tmp_path.iterdir()):
        now, then = pixels(path), pixels(STORED / path.name)
        assert now.shape == then.shape, path.name
        share = float((abs(now - then).max(-1) > 48).mean())
        assert share < OTHER, f"{path.name}: {share:.1%} of the pixels differ; run tools/figures/stages.py methods"


def test_every_picture_is_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "methods").glob("*.md"))
    assert [path.name for path in STORED.iterdir() if path.name not in pages] == []
