"""Checkpoints and processors of transformers' models that differ from the usual: what is made of them, or refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available
from vlm_checkpoints import NEEDS_TORCHVISION, VIDEO_PROCESSORS, write_vlm
from vlm_families import CURRENT
from vlm_families import FAMILIES as TINY
from vlm_processors import PROCESSORS

import tokenprune as tp
from tokenprune.errors import CheckpointError, InputError, UnsupportedError
from tokenprune_adapters.hf import FAMILIES
from tokenprune_adapters.hf.families import TIMM, TORCHVISION
from tokenprune_adapters.hf.processor import _sizes, asked_of, on_device

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
QUESTION = "What is it?"
FRAMES = np.random.default_rng(5).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def fastv() -> tp.Strategy:
    return tp.strategy("fastv", budget=0.5)


# prompts -------------------------------------------------------------------------------------------------------------


def test_got_ocr_asks_as_its_processor_does(tmp_path: Path) -> None:
    """Which writes a prompt where it is given none; its checkpoints have no chat template."""
    model = tp.load(write_vlm(tmp_path / "got_ocr2", "got_ocr2"))
    own = model.processor(images=picture(), return_tensors="pt")
    assert torch.equal(model.inputs(picture(), " OCR: ")["input_ids"], own["input_ids"])
    pages = [picture(), picture(1)]
    own = model.processor(images=[pages], multi_page=True, return_tensors="pt")
    found = model.inputs(pages, " OCR across multi pages: ")
    assert torch.equal(found["input_ids"], own["input_ids"])
    assert torch.equal(found["pixel_values"], own["pixel_values"])


def test_a_chat_template_with_a_text_of_its_own(tmp_path: Path) -> None:
    """As that of PP-Chart2Table's checkpoint."""
    folder = write_vlm(tmp_path / "pp_chart2table", "pp_chart2table")
    (folder / "chat_template.jinja").write_text(f"<img>{'<imgpad>' * 16}</img>\nChart to table", encoding="utf-8")
    model = tp.load(folder)
    assert model.answer(picture(), "Chart to table", fastv(), max_new_tokens=2).trace is not None
    with pytest.raises(InputError, match=r"text of its own in place of the prompt 'What is it\?'.*Chart to table"):
        model.answer(picture(), QUESTION)


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("qianfan_ocr", "Is <IMG_CONTEXT> red?", "has <IMG_CONTEXT> in it, which the processor writes itself"),
        (
            "pp_chart2table",
            "Is <image> red?",
            "no image tokens: PPChart2TableProcessor does not know <image>",
        ),
    ],
)
def test_prompts_that_the_processor_does_not_expand(tmp_path: Path, name: str, prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tp.load(write_vlm(tmp_path / name, name)).answer(picture(), prompt)


def test_an_image_that_is_too_small_for_a_token_beside_another(tmp_path: Path) -> None:
    model = tp.load(write_vlm(tmp_path / "lighton_ocr", "lighton_ocr"))
    with pytest.raises(InputError, match=r"of 64×48, 4×4 pixels into ones with a side of less than 8"):
        model.answer([picture(), picture().resize((4, 4))], QUESTION)


@NEEDS_TORCHVISION
def test_an_image_of_a_single_token(tmp_path: Path) -> None:
    """With which transformers fails where Mistral 3's features lose their only axis of tokens."""
    model = tp.load(write_vlm(tmp_path / "mistral3", "mistral3"))
    small = picture().resize((8, 8))
    with pytest.raises(InputError, match="an image of 8×8 pixels is one image token"):
        model.inputs(small, QUESTION)
    assert model.answer([small, small], QUESTION, max_new_tokens=2).text


# checkpoints ---------------------------------------------------------------------------------------------------------


def test_shieldgemmas_classifier(tmp_path: Path) -> None:
    """Its checkpoints contain a classifier, whose model answers yes or no to a policy that the prompt gives."""
    folder = write_vlm(tmp_path / "shieldgemma2", "shieldgemma2")
    torch.manual_seed(0)
    whole = transformers.ShieldGemma2ForImageClassification(TINY["shieldgemma2"].config()).eval()
    whole.config.yes_token_index, whole.config.no_token_index = whole.yes_token_index, whole.no_token_index = 5, 6
    whole.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ShieldGemma2ForImageClassification"]
    model = tp.load(folder, dtype="float32")
    inputs = model.inputs(picture(), "No violence.")
    text = model.processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert "No violence." in text
    with torch.no_grad():
        seen = whole(**inputs).logits
        assert torch.equal(model.model(**inputs).logits[:, -1, [5, 6]], seen)
        with tp.prune(model, fastv()):
            pruned = model.model(**inputs).logits[:, -1, [5, 6]]
        with tp.prune(whole, fastv()) as run:  # the classifier itself
            assert torch.equal(whole(**inputs).logits, pruned)
    assert run.trace.ledger.image_tokens == (9,)
    assert not torch.equal(pruned, seen)


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_thinkers_within_checkpoints_that_may_also_talk(tmp_path: Path, name: str) -> None:
    folder = write_vlm(tmp_path / name, name)
    alone = tp.load(folder).answer(picture(), QUESTION, fastv(), max_new_tokens=4)
    prefix = {"qwen2_5_omni_thinker": "Qwen2_5Omni", "qwen3_omni_moe_thinker": "Qwen3OmniMoe"}[name]
    config = getattr(transformers, f"{prefix}Config")(
        thinker_config=TINY[name].config().to_dict(), enable_audio_output=False
    )
    whole = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    whole.thinker.load_state_dict(TINY[name].build().state_dict())
    whole.thinker.generation_config = TINY[name].build().generation_config
    whole.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == name.removesuffix("_thinker")
    model = tp.load(folder)
    assert type(model.model) is type(whole.thinker)
    found = model.answer(picture(), QUESTION, fastv(), max_new_tokens=4)
    assert found.trace.ledger == alone.trace.ledger  # type: ignore[union-attr]
    weights = model.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in whole.thinker.state_dict().items())


TIMM_TOWERS = {"perception_lm": "vit_pe_core_tiny_patch16_384", "fast_vlm": "fastvit_t8"}


def test_limits_name_the_types_with_towers_of_timm() -> None:
    assert {name for name, family in FAMILIES.items() if TIMM in family.limits} == set(TIMM_TOWERS)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
@pytest.mark.parametrize("name", TIMM_TOWERS)
def test_towers_of_timm_require_the_package(tmp_path: Path, name: str) -> None:
    folder = write_vlm(tmp_path / name, name)
    config = json.loads((folder / "config.json").read_text())
    args = {"model_args": {"embed_dim": 32}}
    config["vision_config"] = {
        "model_type": "timm_wrapper",
        "architecture": TIMM_TOWERS[name],
        "hidden_size": 32,
        **args,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"needs a package that is not installed, install it .*timm library"):
        tp.load(folder)


def test_tiles_of_a_large_picture_have_fewer_queries_than_the_whole(tmp_path: Path) -> None:
    """DeepSeek-OCR 2: 144 for each of two tiles, 256 for the whole, and a token between."""
    model = tp.load(write_vlm(tmp_path / "deepseek_ocr2", "deepseek_ocr2"))
    inputs = model.inputs(picture().resize((200, 100)), QUESTION)
    assert int((inputs["input_ids"] == model.model.config.image_token_id).sum()) == 2 * 144 + 256 + 1
    trace = model.answer(picture().resize((200, 100)), QUESTION, fastv(), max_new_tokens=2).trace
    assert trace is not None
    assert trace.ledger.equivalent_tokens_ratio <= 0.5


# processors ----------------------------------------------------------------------------------------------------------


def test_no_file_names_the_processor(tmp_path: Path) -> None:
    """Where the type tells none either."""
    folder = write_vlm(tmp_path / "glm_ocr", "glm_ocr")
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no file names the class of a processor"):
        tp.load(folder).answer(picture(), QUESTION)


def test_token_types_are_asked_of_a_processor_that_names_them(tmp_path: Path) -> None:
    """Cosmos 3 Edge's gives none by itself, and its model fails without."""
    model = tp.load(write_vlm(tmp_path / "cosmos3_edge", "cosmos3_edge"))
    inputs = model.inputs(picture(), QUESTION)
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == model.model.config.image_token_id)
    assert model.answer(picture(), QUESTION, fastv(), max_new_tokens=2).trace is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_in_half_precision_take_the_models(dtype: torch.dtype) -> None:
    """Llama 4's processor rounds them to bfloat16."""
    pixels, weights = torch.tensor([0.1, -3.0]), torch.tensor([0.1])
    made = transformers.BatchFeature({"a": pixels.bfloat16(), "b": weights, "c": torch.tensor([1]), "d": [0.5]})
    found = on_device(made, SimpleNamespace(device=torch.device("cpu"), dtype=dtype))
    assert torch.equal(found["a"], pixels.bfloat16().to(dtype))
    assert found["a"].dtype == dtype
    assert [found["b"].dtype, found["c"].dtype, found["d"]] == [torch.float32, torch.int64, [0.5]]


def test_the_side_of_a_crop_is_not_that_of_a_patch() -> None:
    """Step 3.7's image processor calls it `patch_size`."""
    images = SimpleNamespace(patch_size=32, vision_patch_size=4)
    found = list(_sizes(SimpleNamespace(image_processor=images), SimpleNamespace(patch_size=5), 1))
    assert found == [("patches with a side of", 5, 4)]


def test_limits_name_the_processors_that_require_torchvision() -> None:
    limited = {name for name, family in FAMILIES.items() if TORCHVISION in family.limits}
    assert limited == {name for name, own in PROCESSORS.items() if own.torchvision}


KINDS = ("cohere2_vision", "mistral3", "minicpmv4_6")
"""One whose images need torchvision, one whose processor does, and one whose processor reads the part for videos."""


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name, own in PROCESSORS.items()
        if own.torchvision
    ],
)
def test_a_processor_that_requires_torchvision(tmp_path: Path, kind: str) -> None:
    model = tp.load(write_vlm(tmp_path / kind, kind))
    with pytest.raises(CheckpointError, match=r"processor cannot be loaded .*[tT]orchvision.*install the packages"):
        model.answer(picture(), QUESTION)


@pytest.mark.skipif(not is_torchvision_available(), reason="processors of videos need torchvision")
@pytest.mark.parametrize("name", [name for name in PROCESSORS if FAMILIES[name].videos])
def test_videos_of_the_processor(tmp_path: Path, name: str) -> None:
    assert name in VIDEO_PROCESSORS
    model = tp.load(write_vlm(tmp_path / name, name))
    token, glm = model.processor.video_token, FAMILIES[name].one_token
    text = (f"<|begin_of_video|>{token}<|end_of_video|>" if glm else token) + QUESTION
    times = {"fps": 2, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    asked = {"return_metadata": True, **asked_of(model.processor)}  # which Cosmos 3 Edge's lacks by itself
    inputs = model.processor(
        text=text, videos=[FRAMES], video_metadata=[times], do_sample_frames=False, return_tensors="pt", **asked
    )
    inputs.pop("video_metadata", None)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    with torch.inference_mode():
        untouched = model.model.generate(**inputs, **options)
        with tp.prune(model, tp.strategy("none")) as kept:
            assert torch.equal(model.model.generate(**inputs, **options), untouched)
        with tp.prune(model, fastv()) as run:
            model.model.generate(**inputs, **options)
    config = model.model.config
    tokens = int((inputs["input_ids"] == (config.image_token_id if glm else config.video_token_id)).sum())
    assert kept.trace.ledger.image_tokens == run.trace.ledger.image_tokens == (tokens,)
    assert run.trace.ledger.equivalent_tokens_ratio <= 0.5
    numbers = run.trace.layout.image_number
    alone = name in ("llava_next_video", "cosmos3_edge", "gemma4", "gemma4_unified")
    shown = 4 if alone else 2  # two frames are put together
    assert int(numbers.max()) + 1 == shown
