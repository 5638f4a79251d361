"""The launcher, with a stand-in for VLMEvalKit that has what the launcher uses of it, and a tiny random LLaVA."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.testing.tiny_checkpoints import write_tiny_llava

sys.path.insert(0, str(Path(__file__).parents[1]))
from run_pruned import main

CONFIG = """
from functools import partial
from transformers import AutoProcessor, LlavaForConditionalGeneration

class Model:
    def __init__(self, model_path):
        self.model = LlavaForConditionalGeneration.from_pretrained(model_path).eval()
        self.processor = AutoProcessor.from_pretrained(model_path)

    def generate(self, picture):
        inputs = self.processor(images=picture, text="USER: <image>What is it? ASSISTANT:", return_tensors="pt")
        ids = self.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

class Other:
    model = "no module"

supported_VLM = {"tiny": partial(Model, model_path="llava"), "other": Other}
"""
RUN = """
import argparse, json
from PIL import Image
from vlmeval.config import supported_VLM

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--retry", type=int)
args = parser.parse_args()
for make in supported_VLM.values():
    if hasattr(make, "keywords") and "retry" in make.keywords:
        make.keywords["retry"] = args.retry
answer = supported_VLM[args.model]().generate(Image.open("picture.png"))
with open("answer.json", "w") as file:
    json.dump(answer, file)
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, as the current folder."""
    write_tiny_llava(tmp_path / "llava")
    (tmp_path / "vlmeval").mkdir()
    (tmp_path / "vlmeval/__init__.py").touch()
    (tmp_path / "vlmeval/config.py").write_text(CONFIG)
    (tmp_path / "run.py").write_text(RUN)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def answer_of(run: Callable[[], object]) -> list[int]:
    """What run.py writes; VLMEvalKit is imported anew, as in another process."""
    try:
        run()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
            del sys.modules[name]
    return json.loads(Path("answer.json").read_text())


def test_run_py_generates_under_the_strategy(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.argv, sys.path[:0] = ["run.py", "--model", "tiny"], [str(kit)]
    expected = answer_of(lambda: runpy.run_path("run.py", run_name="__main__"))
    assert answer_of(lambda: main("run.py", "none", "--model", "tiny", "--retry", "3")) == expected
    capsys.readouterr()
    assert answer_of(lambda: main("run.py", "fastv:budget=0.35", "--model", "tiny")) != expected
    assert "64 image tokens, 8 from layer 1; 22.0 equivalent tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("strategy", "model", "said"),
    [
        ("fastv:budget=2", "tiny", "strategy 'fastv': budget must be"),
        ("fastw", "tiny", "unknown strategy 'fastw'"),
        ("fastv", "other", "'no module'"),
        ("fastv:layer=2,budget=0.35", "tiny", "0.35"),
    ],
)
def test_what_does_not_work_is_refused(kit: Path, strategy: str, model: str, said: str) -> None:
    with pytest.raises(tp.TokenPruneError, match=said):
        answer_of(lambda: main("run.py", strategy, "--model", model))
    assert not (kit / "answer.json").exists()
