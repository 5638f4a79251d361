"""The page on LISA-7B and ReasonSeg: its configuration has every method, and its commands run, on tiny files."""

from __future__ import annotations

import re
import shlex
import sqlite3
from pathlib import Path

import pytest
import yaml
from clip_checkpoints import whole_clip
from dataset_files import reasonseg
from lisa_checkpoints import write_lisa, write_tower

from tokenprune.cli.app import main
from tokenprune.evaluation.contenders import contenders
from tokenprune.plugins import registry
from tokenprune.sweeps.config import SweepConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reproduce-lisa.md").read_text(encoding="utf-8")
FILE = ROOT / "benchmarks" / "reasonseg.yaml"
PRESETS = {"csp-65", "csp-70"}  # of csp, at budgets of their own
IMAGES = {"val": 200, "test": 779}  # by the authors' page


def configuration() -> SweepConfig:
    return SweepConfig.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def commands() -> list[list[str]]:
    """The tokenprune commands of the page's bash blocks, without the program's name."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "tokenprune" in words[:2]:
                found.append(words[words.index("tokenprune") + 1 :])
    return found


def test_the_configuration_has_every_method_on_both_splits() -> None:
    config = configuration()
    builtin = {name for name, entry in registry.strategies().items() if entry.distribution == "tokenprune-vlm"}
    assert sorted(config.strategies) == sorted(builtin - PRESETS)
    assert [(data.name, data.split, data.protocol) for data in config.datasets] == [
        ("reasonseg", split, "lisa") for split in IMAGES
    ]
    assert all(data.options == {"faithful": True} for data in config.datasets)


def test_the_page_counts_what_the_configuration_has() -> None:
    config = configuration()
    several = len(contenders(config.strategies, config.budgets))
    methods = len(config.strategies) - 2  # without none and blind
    assert several == methods * len(config.budgets) + 2
    assert f"{methods} methods at {len(config.budgets)} budgets and two baselines" in PAGE
    assert f"{several} configurations and {several * sum(IMAGES.values()):,} masks" in PAGE
    trial = len(IMAGES) * (config.limit or 0)
    assert f"{sum(IMAGES.values())}/{trial} = {sum(IMAGES.values()) / trial:.1f}" in PAGE.replace("\n", " ")


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV, for faithful=true: pip install opencv-python-headless")
    pytest.importorskip("plotly", reason="needs plotly, for the report: pip install plotly")
    monkeypatch.chdir(tmp_path)
    write_lisa(tmp_path / "build" / "LISA-7B-v1", tower=False)
    whole_clip(write_tower(tmp_path / "build" / "clip-vit-large-patch14"))
    reasonseg(tmp_path / "build")
    text = FILE.read_text(encoding="utf-8")
    assert "device: cuda" in text
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / FILE.name).write_text(text.replace("device: cuda", "device: cpu"), encoding="utf-8")
    ran = []
    for words in commands():
        with pytest.raises(SystemExit) as done:
            main(["cpu" if word == "cuda" else word for word in words])
        assert not done.value.code, words
        ran.append(words[0])
    assert ran == ["data", "compare", "sweep", "report"]
    store = sqlite3.connect(tmp_path / "build" / "reasonseg" / "results.sqlite")
    rows = store.execute(
        "SELECT c.strategy, COUNT(*) FROM records r JOIN configurations c ON c.hash = r.configuration GROUP BY 1"
    ).fetchall()
    store.close()
    assert sorted(name for name, _ in rows) == sorted(configuration().strategies)
    assert (tmp_path / "build" / "reasonseg.html").stat().st_size > 100_000
    assert len(list((tmp_path / "build" / "tables").iterdir())) == 3
