"""The fine-tuning script: what it writes is a model, it resumes to the bit, and it refuses what does not fit."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from pixellm_checkpoints import write_pixellm
from safetensors.torch import load_file

import tokenprune as tp
from tokenprune.datasets.base import Query, Scene
from tokenprune.errors import InputError, OptionError
from tokenprune.utils.masks import with_ignored

FOLDER = Path(__file__).parents[2] / "examples" / "finetune"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("finetune")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def lisa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lisa(tmp_path_factory.mktemp("lisa"))


def run(script: Any, out: Path, *arguments: object) -> dict[str, torch.Tensor]:
    """The tensors of the trained model."""
    given = script.options([*map(str, arguments), "--out", str(out)])
    return load_file(script.train(given) / "model.safetensors")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("lora", [0, 2])
def test_it_trains_decoder_and_mask_projection_alone(script: Any, lisa: Path, lora: int, tmp_path: Path) -> None:
    options = ("--model", lisa, "--strategy", "fastv:layer=1,keep=0.5", "--steps", 2, "--lora", lora, "--rate", 1e-2)
    found, before = run(script, tmp_path / "out", *options), weights(lisa)
    assert found.keys() == before.keys()
    assert all(found[name].dtype == before[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.text_hidden_fcs.0.0.weight" in changed
    assert not any("visual_model" in name or "mm_projector" in name for name in changed)
    assert ("lm_head.weight" in changed) == (lora == 0)
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    assert tp.load(tmp_path / "out").segment(image, "the ring").masks.shape == (1, 40, 40)


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(
    script: Any, lisa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", lisa, "--strategy", "csp", "--budget", 0.5, "--steps", 4, "--save-every", 1, "--scenes", 1)
    whole = run(script, tmp_path / "whole", *options)
    steps, one_step = iter(range(3)), script.one_step

    def interrupted(*given: Any) -> Any:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return one_step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(script, "one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(script, tmp_path / "pieces", *options)
    assert not (tmp_path / "pieces" / "model.safetensors").exists()
    pieces = run(script, tmp_path / "pieces", *options, "--checkpointing")  # which changes no result
    assert all((pieces[name] - whole[name]).abs().max() <= 1e-6 for name in whole)
    log = (tmp_path / "pieces" / script.LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]
    with pytest.raises(InputError, match=r"holds a training with budget=0\.5 \(now 0\.4\); give another --out"):
        run(script, tmp_path / "pieces", *options, "--budget", 0.4)
    with pytest.raises(InputError, match="holds another model, which would be overwritten"):
        run(script, lisa, *options)


@pytest.mark.parametrize("write", [write_lisa, write_glamm, write_pixellm])
def test_every_family_has_losses_with_gradients(script: Any, write: Any, tmp_path: Path) -> None:
    """Of the right tokens, too: those of the answers alone."""
    model = tp.load(write(tmp_path))
    weights, _ = script.prepared(model, 0, True)
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:20, 10:30] = True
    ignored = with_ignored(mask, np.roll(mask, 20, 1))
    scene = Scene(
        "one", np.zeros((40, 60, 3), np.uint8), [Query("the ring", "", mask), Query("a red star", "", ignored)]
    )
    parts = script.scene_losses(model, scene, tp.strategy("fastv", layer=1, keep=0.5))
    assert parts.keys() == script.WEIGHTS.keys()
    sum(parts.values()).backward()
    for part in ("decoder.model.layers.0.", "mask_projection."):
        assert any(weight.grad.abs().max() > 0 for name, weight in weights.items() if part in name)
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if name.startswith("tower"))


def test_the_loss_of_the_answer_is_that_of_its_tokens(script: Any, lisa: Path) -> None:
    objective, model = importlib.import_module("objective"), tp.load(lisa)
    inputs = model.build_inputs(np.zeros((40, 40, 3), np.uint8), ["the ring", "the large red star"])
    sequence = inputs.sequence
    states = torch.randn(*sequence.token_ids.shape, model.decoder.config.hidden_size)
    losses = []
    for row, ids in enumerate(sequence.token_ids.tolist()):
        end = int(sequence.attention_mask[row].sum())
        start = ids.index(model.seg_ids[0])  # "[SEG].</s>" begins with it
        logits = model.decoder.lm_head(states[row, start - 1 : end - 1])
        losses.append(torch.nn.functional.cross_entropy(logits, sequence.token_ids[row, start:end]))
    assert objective.answer_loss(model, inputs, states).item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)


def test_ignored_pixels_count_in_no_loss(script: Any) -> None:
    objective = importlib.import_module("objective")
    target = np.zeros((4, 4), dtype=bool)
    target[:2] = True
    corner = np.zeros((4, 4), dtype=bool)
    corner[3, 3] = True
    logits = torch.where(torch.from_numpy(target), 20.0, -20.0)[None]
    wrong = logits.clone()
    wrong[0, 3, 3] = 20.0
    for good in (objective.mask_losses(logits, [target]), objective.mask_losses(wrong, [with_ignored(target, corner)])):
        assert max(float(part) for part in good) < 1e-5
    assert all(float(part) > 0.02 for part in objective.mask_losses(wrong, [target]))


def test_what_does_not_fit_is_refused(script: Any, lisa: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--steps"):
        run(script, tmp_path, "--model", lisa, "--steps", 0)
    with pytest.raises(OptionError, match="strateg"):
        run(script, tmp_path, "--model", lisa, "--strategy", "fastv:layers=2")
    assert not list(tmp_path.iterdir())
