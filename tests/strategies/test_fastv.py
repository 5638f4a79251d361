"""FastV against the reference run of the authors' decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tokenprune
from tokenprune_strategies.fastv import FastV


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = golden("fastv")
    return json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: tuple[dict[str, Any], dict[str, Tensor]]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    about, tensors = case
    dims = {name: value for name, value in about["dims"].items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": about["dims"]["rope_theta"]}
    config = LlamaConfig(**dims, rope_parameters=rope, attn_implementation=request.param)
    model = LlamaForCausalLM(config).eval()
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing
    assert all("inv_freq" in name for name in unexpected)
    return model


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_scores_kept_tokens_lengths_and_logits(
    setting: int, llama: Any, case: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    about, tensors = case
    chosen, first, images = about["settings"][setting], about["SYS"], about["IMG"]
    embeddings = tensors["inputs_embeds"].float()
    mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    mask[:, first : first + images] = True
    strategy = FastV(layer=chosen["K"], keep=chosen["kept_image_tokens"])
    with torch.no_grad(), tokenprune.prune(llama, strategy, image_tokens=mask) as run:
        logits = llama(inputs_embeds=embeddings, use_cache=False).logits
    stage = run.trace.stages[0]
    kept = tensors[f"setting{setting}.kept_indices"]
    top = tensors[f"setting{setting}.top_image_indices"]
    assert stage.scores is not None
    torch.testing.assert_close(stage.scores[0], tensors[f"setting{setting}.image_scores"], atol=1e-5, rtol=0)
    assert stage.kept[0] == sorted(top.tolist())
    assert [i for i in range(mask.shape[1]) if not mask[0, i] or bool(stage.active[0, i - first])] == kept.tolist()
    lengths = [entry.image[0] + entry.other[0] for entry in run.trace.ledger.entries]
    assert lengths == [layer[0] for layer in chosen["attention_lengths"]]
    torch.testing.assert_close(logits[:, kept], tensors[f"setting{setting}.logits_inplace"], atol=1e-4, rtol=0)
