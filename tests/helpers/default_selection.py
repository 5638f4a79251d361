"""Which tests of transformers' families run by default, and which with `-m slow`.

A family that differs from another by its tower's or its decoder's sizes alone runs the tests that hold it to the oracle
by default; the others of them, which test code that it shares, are slow. So are eager attention, and the kit for
adapters, to whose properties the tests of adapters/hf hold each family, but for the families of `EAGER`.
"""

from __future__ import annotations

import pytest

ALIKE = (
    *("llava_siglip", "qwen3_vl_moe", "idefics3", "paligemma2", "shieldgemma2", "deepseek_vl", "janus"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "cosmos3_omni", "glm46v", "glm4v_moe", "glm_ocr", "glmga"),
    *("qianfan_ocr", "cohere2_vision", "got_ocr2", "pp_chart2table", "aria", "qwen3_5_moe", "lfm3_vl"),
    *("minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "hyperclovax_vision_v2", "lighton_ocr", "llava_pixtral"),
    *("chameleon", "gemma4_unified", "muse_spark", "perception_lm", "fast_vlm", "exaone4_5", "cosmos3_edge"),
)
"""Families, each like another that runs every test."""
FILES = ("tests/adapters/hf/", "tests/testing/test_adapter_conformance.py", "tests/engine/test_compatibility.py")
BY_DEFAULT = (
    "test_pruned_equals_the_oracle",
    "test_keep_all_generates_the_same_to_the_bit",
    "test_cached_decoding_equals_recomputation",
    "test_the_adapter_finds_the_image_tokens",
    "test_image_tokens_pictures_and_cells",
    "test_projected_features_are_the_embeddings",
    "test_where_image_tokens_are",
    "test_every_pair_can_be_read_off_the_page",
)
"""Tests that families of `ALIKE` run by default too."""
LOADED_ALIKE = (
    *("qwen3_5", "qwen3_5_moe", "lfm3_vl", "exaone4_5", "mistral3", "gemma4", "gemma4_unified", "muse_glimmer"),
    *("muse_spark", "kimi_k25", "lfm2_vl", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "chameleon", "deepseek_ocr2"),
    *("perception_lm", "fast_vlm", "molmo2", "step3p7"),
)
"""Families that are loaded and asked as others are."""
LOADING = (
    *("tests/adapters/hf/test_load.py", "tests/adapters/hf/test_load_variants.py"),
    "tests/adapters/hf/test_cells_of_processors.py",
    *("tests/adapters/segmentation/test_answer_batch.py", "tests/utils/test_images.py"),
)
EAGER = ("llava", "qwen2_vl", "gemma3", "paligemma", "llama4", "qwen3_5", "lfm2_vl", "cohere_compass")
"""Families that run by default with eager attention, in the kit and with every strategy: one of each kind of mask."""


def is_left_to_slow(item: pytest.Item) -> bool:
    """Whether a test is one of shared code on a family of `ALIKE`, of loading on one of `LOADED_ALIKE`, or of eager
    attention or the kit beside `EAGER`."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    family = parameters.get("name", parameters.get("family"))
    if item.nodeid.startswith(LOADING) and family in LOADED_ALIKE:
        return True
    if family is None or not item.nodeid.startswith(FILES):
        return False
    of_the_kit = "family" in parameters and item.nodeid.startswith("tests/testing/")
    if (of_the_kit or parameters.get("attention") == "eager") and family not in EAGER:
        return True
    return family in ALIKE and getattr(item, "originalname", "") not in BY_DEFAULT
