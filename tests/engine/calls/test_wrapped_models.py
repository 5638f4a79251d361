"""Models inside wrappers: pruned as they are without, and refused where the wrapper changes their input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT, FAMILIES

import tokenprune as tp
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

STRATEGY = tp.strategy("fastv", layer=1, keep=5)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


def lora(model: nn.Module) -> Any:
    """The model with a random LoRA on queries and values of its decoder, and the same merged into a copy."""
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = peft().get_peft_model(model, peft().LoraConfig(**options)).eval()
    return wrapped, copy.deepcopy(wrapped).merge_and_unload().eval()


@torch.no_grad()
def pruned(held: Any, called: Any, inputs: dict[str, Any], **marks: Any) -> tuple[Any, Any]:
    with tp.prune(held, STRATEGY, **marks) as run:
        return called(**inputs).logits, run.trace


def same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert found[1].stages[0].kept == expected[1].stages[0].kept
    assert found[1].ledger.entries[-1].image == (5,) * len(found[0])
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["DataParallel", "DistributedDataParallel", "both"])
def test_parallel_wrappers(kind: str, alone: None) -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs([(30, 30), (30, 30)])
    wrapped: Any = model
    if kind != "DataParallel":
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    if kind != "DistributedDataParallel":
        wrapped = nn.DataParallel(wrapped)
    expected = pruned(model, model, inputs)
    same(pruned(wrapped, wrapped, inputs), expected)
    assert tp.compatible("fastv", wrapped)


def test_a_batch_split_over_devices_is_refused() -> None:
    wrapped = nn.DataParallel(tiny_llama())
    wrapped.device_ids = [0, 1]
    with pytest.raises(UnsupportedError, match="2 devices"), tp.prune(wrapped, STRATEGY):
        pass


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_peft(name: str) -> None:
    """A model with a LoRA is the model that it is merged into."""
    inputs = FAMILIES[name].inputs([(30, 30), (30, 30)])
    wrapped, merged = lora(FAMILIES[name].build())
    expected = pruned(merged, merged, inputs)
    same(pruned(wrapped, wrapped, inputs), expected)
    same(pruned(nn.DataParallel(wrapped), wrapped, inputs), expected)
    plain = FAMILIES[name].build()
    assert not torch.allclose(expected[0], pruned(plain, plain, inputs)[0], atol=1e-3)


def test_peft_of_a_language_model() -> None:
    ids, image = torch.arange(24).reshape(2, 12), torch.zeros(2, 12, dtype=torch.bool)
    image[:, 2:10] = True
    wrapped, merged = lora(tiny_llama())
    marks = {"image_tokens": image}
    same(pruned(wrapped, wrapped, {"input_ids": ids}, **marks), pruned(merged, merged, {"input_ids": ids}, **marks))
    with tp.prune(wrapped, STRATEGY, image_tokens=image) as run:
        wrapped.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert run.trace.ledger.entries[-1].image == (5, 5)


def test_virtual_tokens_are_refused() -> None:
    """They would come before the prompt, and the marks be those of other tokens."""
    config = peft().PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft().get_peft_model(tiny_llama(), config)
    with (
        pytest.raises(UnsupportedError, match="PROMPT_TUNING, which prepends virtual tokens"),
        tp.prune(wrapped, STRATEGY),
    ):
        pass


def test_virtual_tokens_around_a_model_that_is_pruned_are_refused() -> None:
    model, ids, image = tiny_llama(), torch.arange(1, 13)[None], torch.zeros(1, 12, dtype=torch.bool)
    image[:, 2:10] = True
    wrapped = peft().get_peft_model(model, peft().PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        with tp.prune(model, STRATEGY, image_tokens=image):
            with pytest.raises(
                InputError, match=r"covers 12 positions, .* inputs_embeds has 15, .* over the whole input"
            ):
                wrapped(input_ids=ids)
            with pytest.raises(InputError, match="inputs_embeds has 15"):
                wrapped.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
            expected = model(ids).logits
            assert torch.equal(model(inputs_embeds=embeds).logits, expected)
            cache = model(inputs_embeds=embeds).past_key_values
            assert model(inputs_embeds=embeds[:, :3], past_key_values=cache).logits.shape[1] == 3
        whole = torch.cat((image.new_zeros(1, 3), image), 1)
        embeds = torch.cat((wrapped.get_prompt(batch_size=1), embeds), 1)
        same(
            pruned(model, wrapped, {"input_ids": ids}, image_tokens=whole),
            pruned(model, model, {"inputs_embeds": embeds}, image_tokens=whole),
        )


@pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
def test_pipelines(tmp_path: Path) -> None:
    model = tp.load(write_vlm(tmp_path / "llava", "llava"))
    pipeline = transformers.pipeline("image-text-to-text", model=model.model, processor=model.processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8))
    options: dict[str, Any] = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "return_full_text": False}
    with tp.prune(model.model, STRATEGY) as plain:
        inputs = model.inputs(picture, "<image>What is it?")
        new = model.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with tp.prune(pipeline, STRATEGY) as run:
        (found,) = pipeline(images=picture, text="<image>What is it?", **options)
    assert found["generated_text"] == model.processor.decode(new, skip_special_tokens=True)
    assert run.trace.stages[0].kept == plain.trace.stages[0].kept
