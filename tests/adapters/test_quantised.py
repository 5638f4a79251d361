"""Models whose decoder is quantised while it is loaded, with bitsandbytes, which has code for processors too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from pixellm_checkpoints import write_pixellm
from sa2va_checkpoints import write_sa2va
from torch import nn
from transformers import BitsAndBytesConfig
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.errors import OptionError, UnsupportedError

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
WRITERS: dict[str, Callable[..., Path]] = {
    "lisa": write_lisa,
    "glamm": write_glamm,
    "pixellm": write_pixellm,
    "sa2va": write_sa2va,
}
IMAGE = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
CLASSES = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}
needs_tiny_processors = pytest.mark.skipif(
    not CURRENT, reason="the tiny processors are those of transformers 5.20 and later"
)


def restored(layer: Any) -> torch.Tensor:
    """The weights that a quantised layer stands for."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB[:, None] / 127


def with_restored_weights(plain: Any, quantised: nn.Module) -> Any:
    """The model in floating point, with the weights that the quantised decoder's layers stand for."""
    found = copy.deepcopy(plain)
    for name, layer in quantised.named_modules():
        if isinstance(layer, tuple(CLASSES.values())):
            found.decoder.get_submodule(name).weight.data.copy_(restored(layer))
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("lisa-tiny", "nf4"),
        ("lisa-tiny", "int8"),
        ("glamm", "int8"),
        ("pixellm", "int8"),
        ("sa2va", "int8"),
    ],  # nf4 has blocks of 64
)
def test_masks_are_those_of_the_weights_that_are_stored(tmp_path: Path, family: str, kind: str) -> None:
    folder = WRITERS[family](tmp_path) if family in WRITERS else family
    plain = tp.load(folder)
    model = tp.load(folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    layers = [layer for layer in model.decoder.modules() if isinstance(layer, CLASSES[kind])]
    assert len(layers) == 7 * len(model.decoder.model.layers)
    assert not any(isinstance(part, CLASSES[kind]) for name, part in model.named_modules() if "decoder" not in name)
    same = with_restored_weights(plain, model.decoder)
    for strategy in (None, tp.strategy("random", budget=0.5), tp.strategy("fastv", layer=1, keep=0.5)):
        ours, theirs = (one.segment(IMAGE, "the red thing", strategy, answer="forced") for one in (model, same))
        scale = float(theirs.low_res_logits.abs().max())
        # bitsandbytes rounds states too, to int8 or bfloat16
        assert float((ours.low_res_logits - theirs.low_res_logits).abs().max()) < 0.05 * scale
        if strategy is not None:
            assert ours.trace.ledger.entries == theirs.trace.ledger.entries
            assert ours.trace.ledger.entries[-1].image < ours.trace.ledger.image_tokens


@needs_tiny_processors
def test_answers_of_transformers_models(tmp_path: Path) -> None:
    """Pruning that keeps everything says the same as no pruning; a pruned answer comes from fewer tokens."""
    model = tp.load(write_vlm(tmp_path, "llava"), quantization_config=BitsAndBytesConfig(**KINDS["int8"]))
    picture = (IMAGE.permute(1, 2, 0) * 255).byte().numpy()
    untouched = model.answer(picture, "What is it?")
    kept = model.answer(picture, "What is it?", tp.strategy("fastv", layer=1, keep=1.0))
    assert kept.text == untouched.text
    pruned = model.answer(picture, "What is it?", tp.strategy("fastv", layer=1, keep=0.5))
    assert pruned.trace.ledger.entries[-1].image < pruned.trace.ledger.entries[0].image


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_the_old_options_name_the_new_one(tmp_path: Path, family: str, option: str) -> None:
    with pytest.raises(OptionError, match=rf"BitsAndBytesConfig\({option}=True\).*package bitsandbytes"):
        tp.load(WRITERS[family](tmp_path), **{option: True})


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    for wrong in (True, "nf4", {"bits": 4}):
        with pytest.raises(OptionError, match=r"^quantization_config=.* transformers does not accept it"):
            tp.load(write_lisa(tmp_path), quantization_config=wrong)


@needs_tiny_processors
def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    def lacking(*args: Any, **kwargs: Any) -> None:
        raise ImportError("requires `bitsandbytes`")

    monkeypatch.setattr(Bnb8BitHfQuantizer, "validate_environment", lacking)
    vlm = write_vlm(tmp_path / "llava", "llava")
    for folder in (vlm, write_lisa(tmp_path / "lisa")):
        with pytest.raises(UnsupportedError, match=r"a package that is not installed, install it \(.*bitsandbytes"):
            tp.load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert json.loads((vlm / "config.json").read_text())["model_type"] == "llava"
    with pytest.raises(OptionError, match=r"BitsAndBytesConfig\(load_in_4bit=True\).*package bitsandbytes"):
        tp.load(vlm, load_in_4bit=True)
