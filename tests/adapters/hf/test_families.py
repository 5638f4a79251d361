"""The tiny vision-language models that other tests prune are sound: untouched, they do what their families do."""

from __future__ import annotations

import pytest
import torch
from vlm_families import FAMILIES, NAMES, RECOMPUTES, VIDEO_NAMES, generates_otherwise
from vlm_known import model_of

from tokenprune_adapters.hf.families import FAMILIES as KNOWN
from tokenprune_adapters.hf.families import ROWS_DIFFER

SIZES = [(24, 32), (40, 20)]
DIFFERENT_COUNTS = {
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "glm4v",
    "glm46v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "cosmos3_omni",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "lighton_ocr",
    "paddleocr_vl",
    "video_llama_3",
    "hyperclovax_vision_v2",
    "ernie4_5_vl_moe",
    "mistral3",
    "step3p7",
    "kimi_k25",
    "cosmos3_edge",
    "granite4_vision",
    "cohere_compass",
    "llava_pixtral",
    "gemma4_unified",
    "gemma4",
    "deepseek_ocr2",
    "muse_glimmer",
    "muse_spark",
    "exaone4_5",
    "granite_docling",
    "internvl",
    "qianfan_ocr",
    "smolvlm",
    "idefics3",
    "llama4",
    "qwen3_5",
    "qwen3_5_moe",
    "lfm2_vl",
    "lfm3_vl",
    "minicpmv4_6",
    "minicpmv4_7",
    "minicpm_ocr",
}
names = pytest.mark.parametrize("name", NAMES)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@torch.no_grad()
def logits_of(name, inputs, attention="sdpa"):
    return model_of(name, attention)(**inputs).logits


@names
@attentions
def test_forward_and_generate_run(name, attention):
    inputs = FAMILIES[name].inputs(SIZES)
    logits = logits_of(name, inputs, attention)
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert logits.isfinite().all()
    new = model_of(name, attention).generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
    placeholders = FAMILIES[name].image_tokens({"input_ids": new})
    assert new.shape == (2, 3)
    assert not placeholders.any()


@names
def test_eager_and_sdpa_agree(name):
    inputs = FAMILIES[name].inputs(SIZES)
    valid = inputs["attention_mask"].bool()
    difference = (logits_of(name, inputs) - logits_of(name, inputs, "eager"))[valid].abs().max()
    assert difference < 5e-5


@names
def test_logits_depend_on_every_image(name):
    """Behind an image, not before it; each image of a row matters."""
    inputs = FAMILIES[name].inputs([[(24, 32), (32, 24)]])
    logits = logits_of(name, inputs)
    pixels = inputs["pixel_values"]
    for part in (slice(0, 1), slice(len(pixels) - 1, None)) if len(pixels) > 1 else (slice(None),):
        changed = pixels.clone()
        changed[part] = -changed[part] + 0.5
        other = logits_of(name, {**inputs, "pixel_values": changed})
        assert (other[:, -1] - logits[:, -1]).abs().max() > 1e-3
        if not FAMILIES[name].image_first:
            assert torch.equal(other[:, 0], logits[:, 0])


@names
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_of_two_sizes_equals_singles(name, padding):
    family = FAMILIES[name]
    inputs = family.inputs(SIZES, padding=padding)
    assert not inputs["attention_mask"].all()
    counts = family.image_tokens(inputs).sum(1).tolist()
    assert (counts[0] != counts[1]) == (name in DIFFERENT_COUNTS)
    together = logits_of(name, inputs)
    for row, size in enumerate(SIZES[:1] if ROWS_DIFFER in KNOWN[model_of(name).config.model_type].limits else SIZES):
        alone = logits_of(name, family.inputs([size], first=row))[0]
        assert (together[row][inputs["attention_mask"][row].bool()] - alone).abs().max() < 5e-5


@pytest.mark.parametrize("name", VIDEO_NAMES)
def test_videos_run_and_matter(name):
    family = FAMILIES[name]
    inputs = family.inputs([(2, 16, 24), (2, 24, 16)])
    assert family.image_tokens(inputs).any(1).all()
    logits = logits_of(name, inputs)
    other = logits_of(name, {**inputs, "pixel_values_videos": -inputs["pixel_values_videos"]})
    assert (other[:, -1] - logits[:, -1]).abs().max() > 1e-3


@RECOMPUTES
@names
def test_cached_decoding_equals_recomputation(name):
    if reason := generates_otherwise(name, {"use_cache": False}):
        pytest.skip(reason)
    family = FAMILIES[name]
    inputs = family.inputs(SIZES)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model_of(name).generate(**inputs, **options)
    again = model_of(name).generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    assert all((a - b).abs().max() < 5e-5 for a, b in zip(cached.logits, again.logits, strict=True))


@names
def test_decoder_has_four_layers_and_what_an_engine_needs(name):
    decoder = FAMILIES[name].decoder(model_of(name))
    assert len(decoder.layers) == 4
    assert callable(getattr(decoder, "norm", None) or decoder.embedding_norm)
    assert callable(decoder.rotary_emb)
