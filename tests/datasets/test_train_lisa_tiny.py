"""The training of lisa-tiny: a run that is stopped and started again gives what a run in one go gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "train_lisa_tiny"
SCRIPT = """
import sys
from pathlib import Path
import torch
from common import Recipe, Run
from finetune import Stage, train_decoder
import finetune
from pretrain import train_sam, train_tower

torch.set_num_threads(1)
finetune.STAGES = ((0.5, Stage(8, True, 4, 2)), (1.01, Stage(16, False, 4, 2)))
finetune.EVALUATED, finetune.EVALUATE_EVERY = 2, 2
recipe = Recipe(Path(sys.argv[1]), seed=3, taught=())
stops = dict(pair.split("=") for pair in sys.argv[2:])
keep = Run.keep

def stopping(run):
    if stops.get(run.name) == str(run.step):
        run._ask_to_stop()
    keep(run)

Run.keep = stopping
train_sam(recipe, 2)
train_tower(recipe, 2)
train_decoder(recipe, 4, masks=False, rate=1e-3)
"""


def train(folder: Path, *stops: str) -> None:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(folder), *stops]
    subprocess.run(command, cwd=TOOL, check=True, capture_output=True, timeout=600)


def state(folder: Path, phase: str) -> dict[str, object]:
    saved = torch.load(folder / f"{phase}.pt", weights_only=True)
    del saved["spent"]
    return dict(flat(saved))


def flat(value, name=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{name}.{index}")
    else:
        yield name, value


@pytest.mark.slow
def test_a_resumed_run_gives_what_one_in_one_go_gives(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    train(cut, "sam=1")
    assert state(cut, "sam")[".step"] == 1
    train(cut, "tower=1")
    train(cut, "decoder=3")
    assert state(cut, "decoder")[".step"] == 3
    train(cut)
    for phase, steps in (("sam", 2), ("tower", 2), ("decoder", 4)):
        first, second = state(whole, phase), state(cut, phase)
        assert first.keys() == second.keys()
        assert first[".step"] == steps
        for name, value in first.items():
            same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
            assert same, f"{phase}: {name}"
