"""Answers about videos are those of transformers' own processor and model, pruned or not, alone or in a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available
from vlm_checkpoints import placeholder, write_vlm
from vlm_families import CURRENT
from vlm_known import model_of
from vlm_videos import GLM, NAMES, STOOD_IN, clip, load_video_vlm, video_marks, video_token, write_film
from vlm_watching import inputs_of

import tokenprune as tp
from tokenprune.errors import InputError, OptionError, UnsupportedError
from tokenprune_adapters.hf.model import VisionLanguageModel

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
Models = Callable[[str], VisionLanguageModel]
QUESTION = "What happens?"
STEPS = 4
NEEDS_TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="its video processor needs torchvision")
FAMILIES = [
    pytest.param(name, marks=() if name in STOOD_IN else (NEEDS_TORCHVISION, pytest.mark.slow)) for name in NAMES
]

LIGHT = [one for one in FAMILIES if not one.values[0].endswith("_thinker")]
"""Without Omni, which is Qwen2.5-VL or Qwen3-VL here, with thousands of tokens in any video."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The loaded model of a family."""
    root = tmp_path_factory.mktemp("vlm")

    @functools.cache
    def model(name: str) -> VisionLanguageModel:
        return load_video_vlm(root / name, name) if name in NAMES else tp.load(write_vlm(root / name, name))

    return model


def picture(height: int = 24, width: int = 32, seed: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fastv() -> Any:
    return tp.strategy("fastv", layer=1, keep=0.5)


def metadata(frames: int, fps: float) -> dict[str, Any]:
    return {
        "total_num_frames": frames,
        "fps": fps,
        "duration": frames / fps,
        "frames_indices": list(range(frames)),
        "height": 24,
        "width": 32,
    }


def generated(model: VisionLanguageModel, inputs: Any) -> str:
    with torch.inference_mode():
        ids = model.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(model.processor.decode(ids, skip_special_tokens=True))


def shown(model: VisionLanguageModel, answer: Any) -> tuple[Any, ...]:
    """The text, and the tokens at every stage."""
    return answer.text, answer.trace.summary(answer.row), [stage.kept[answer.row] for stage in answer.trace.stages]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_generate(name: str, models: Models) -> None:
    model, video = models(name), clip()
    text = f"USER: {video_marks(name)}{QUESTION}ASSISTANT:"
    expected = model.processor(
        text=[text], videos=[video], video_metadata=[metadata(6, 4.0)], do_sample_frames=False, return_tensors="pt"
    )
    inputs = model.inputs(None, QUESTION, video=video, fps=4)
    if "video_second_per_grid" in expected:  # of Omni, whose processor does not look at the metadata
        expected["video_second_per_grid"] = torch.tensor([2 / 4])
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)

    found = model.answer(None, QUESTION, max_new_tokens=STEPS, video=video, fps=4)
    assert found.text == generated(model, expected)
    assert found.text
    assert found.trace is None
    with tp.prune(model, fastv()) as run:
        pruned = generated(model, expected)
    answer = model.answer(None, QUESTION, fastv(), STEPS, video=video, fps=4)
    assert answer.trace is not None
    assert answer.text == pruned
    assert answer.trace.ledger == run.trace.ledger
    assert answer.trace.stages[0].kept == run.trace.stages[0].kept
    layout = answer.trace.layout
    tokens = inputs["input_ids"] == (
        model.model.config.image_token_id if name in GLM else model.processor.video_token_id
    )
    separators = {"video_llava": 6, "llava_onevision": 1}  # the [CLS] token of each frame; the newline behind a video
    assert answer.trace.ledger.image_tokens == (int(tokens.sum()) - separators.get(name, 0),)
    alone = name in ("llava_onevision", "llava_next_video", "video_llava", "video_llama_3")
    assert int(layout.image_number.max()) + 1 == (6 if alone else 3)  # others put two frames together


@pytest.mark.parametrize(
    ("name", "frames", "side"),
    [("qwen2_5_vl", 3, (3, 4)), ("llava_onevision", 6, (2, 2))],  # of pairs of frames, merged; of frames, pooled
)
def test_a_frame_is_an_image_with_a_grid(name: str, frames: int, side: tuple[int, int], models: Models) -> None:
    answer = models(name).answer(None, QUESTION, fastv(), 1, video=clip(6, 24, 32))
    assert answer.trace is not None
    layout = answer.trace.layout
    cells = [[row, column] for row in range(side[0]) for column in range(side[1])]
    tokens = layout.image_number[0] >= 0
    assert layout.grid[0, tokens].tolist() == cells * frames
    assert layout.image_number[0, tokens].tolist() == [number for number in range(frames) for _ in cells]


@NEEDS_TORCHVISION
@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
def test_files_are_sampled_as_the_processor_does(name: str, models: Models, tmp_path: Path) -> None:
    """Which is given the whole video here, and the frames that it chooses in our hands."""
    model, video = models(name), clip(24)
    whole = {"total_num_frames": 24, "fps": 8.0, "duration": 3.0, "height": 24, "width": 32}
    if not model.processor.video_processor.do_sample_frames:
        whole["frames_indices"] = list(range(24))
    expected = model.processor(
        text=[f"USER: {video_marks(name)}{QUESTION}ASSISTANT:"],
        videos=[video],
        video_metadata=[whole],
        return_tensors="pt",
    )
    inputs = model.inputs(None, QUESTION, video=write_film(tmp_path / "film.avi", video, 8.0))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", LIGHT)
def test_a_batch_answers_as_its_rows_alone(name: str, models: Models) -> None:
    """A video, two of them, an image, and both in one prompt."""
    model = models(name)
    videos: list[Any] = [clip(4, seed=1), [clip(4, seed=2), clip(4, 24, 24, seed=3)], None, clip(4, seed=4)]
    images: list[Any] = [None, None, picture(), [picture(32, 24), picture(24, 24)]]
    prompts = ["What?", "And why is it so different from the other?", "What is it?", "Is it there?"]
    if name in GLM:  # whose one token marks both
        videos, images, prompts = videos[:2], [None, None], prompts[:2]
    options: dict[str, Any] = {"max_new_tokens": STEPS}
    together = model.answer(images, prompts, fastv(), **options, video=videos)
    for row, (image, prompt, video) in enumerate(zip(images, prompts, videos, strict=True)):
        alone = model.answer(image, prompt, fastv(), **options, video=video)
        assert shown(model, together[row]) == shown(model, alone)
        untouched = model.answer(image, prompt, **options, video=video)
        assert untouched.text == generated(model, model.inputs(image, prompt, video=video))
    for_all = model.answer(None, prompts[:2], fastv(), **options, video=videos[0])
    assert shown(model, for_all[0]) == shown(model, together[0])
    for_each = model.answer(None, [prompts[0]], fastv(), **options, video=[videos[0], videos[0]])
    assert [one.text for one in for_each] == [for_all[0].text] * 2


@pytest.mark.parametrize("name", LIGHT)
def test_beams(name: str, models: Models) -> None:
    model, options = models(name), {"max_new_tokens": STEPS, "num_beams": 2}
    inputs = model.inputs(None, QUESTION, video=clip())
    if name in GLM:  # whose placeholders of videos transformers does not find among the ids
        with pytest.raises(UnsupportedError, match="transformers has no beam search"):
            model.answer(None, QUESTION, **options, video=clip())
        return
    for strategy in (fastv(), tp.strategy("none")):
        with torch.inference_mode(), tp.prune(model, strategy):
            ids = model.model.generate(**inputs, **options, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found = model.answer(None, QUESTION, strategy, **options, video=clip())
        assert found.text == model.processor.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", STOOD_IN)
def test_placeholders_by_hand(name: str, models: Models) -> None:
    model, mark = models(name), video_marks(name)
    written = f"First {mark}, then {mark}?"
    inputs = model.inputs(None, written, video=[clip(4), clip(4, seed=1)])
    assert "USER" not in model.processor.decode(inputs["input_ids"][0])
    whole = model.inputs(None, QUESTION, video=[clip(4), clip(4, seed=1)])
    assert torch.equal(inputs["pixel_values_videos"], whole["pixel_values_videos"])
    token = video_token(name)
    for prompt, video, counts in (
        (written, clip(4), f"2 placeholders {token}, but there are 1 videos"),
        (f"{token}?", [clip(4), clip(4)], f"1 placeholders {token}, but there are 2 videos"),
    ):
        with pytest.raises(InputError, match=counts.replace("|", r"\|")):
            model.inputs(None, prompt, video=video)
    with pytest.raises(InputError, match=r"but there are 0 videos"):
        model.inputs(picture(), f"{placeholder(name)}{token}?")
    with pytest.raises(InputError, match=r"0 placeholders .*, but there are 1 images"):
        model.inputs(picture(), f"{token}?", video=clip(4))


def test_a_template_that_leaves_videos_out(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("qwen2_5_vl")
    monkeypatch.setattr(model.processor, "chat_template", model.processor.chat_template.replace("'video'", "'film'"))
    with pytest.raises(InputError, match=r"its chat template leaves out videos; write the prompt with <\|video_pad\|>"):
        model.inputs(None, QUESTION, video=clip(4))


def test_rates_and_numbers_of_frames_reach_the_processor(models: Models) -> None:
    model = models("qwen2_5_vl")
    seconds = [model.inputs(None, QUESTION, video=clip(8), fps=fps)["second_per_grid_ts"] for fps in (1, 4)]
    assert [value.item() for value in seconds] == [2.0, 0.5]
    fewer = model.inputs(None, QUESTION, video=clip(8), frames=4)
    assert torch.equal(
        fewer["pixel_values_videos"], model.inputs(None, QUESTION, video=clip(8)[::2])["pixel_values_videos"]
    )
    assert fewer["video_grid_thw"].tolist() == [[2, 6, 8]]


def test_padding_is_no_part_of_a_prompts_length(models: Models) -> None:
    """Of positions that are counted without image tokens; the model's maximum is 512."""
    inputs = models("qwen2_5_vl").inputs(None, ["What?", "Why?"], video=[clip(96), clip(2)])
    assert int((inputs["attention_mask"] == 0).sum()) == 47 * 12 + 1
    with pytest.raises(InputError, match="maximum is 512"):
        models("llava_onevision").inputs(None, "What?", video=clip(180))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"video": []}, InputError, "an empty list of videos found"),
        ({"video": [clip(2), 7]}, InputError, "video 7 found, expected a path"),
        ({"video": clip(2)[0]}, InputError, r"video of shape \[24, 32, 3\] found"),
        ({"video": clip(2), "prompt": [QUESTION, ""]}, InputError, "prompt '' found"),
        (
            {"video": [clip(2)] * 3, "prompt": ["What?", "Why?"]},
            InputError,
            "3 videos and 2 prompts found; pass a prompt",
        ),
        ({"video": [clip(2), None], "prompt": ["What?", "Why?"]}, InputError, "neither an image nor a video found"),
        ({"video": clip(2), "frames": 3}, InputError, "an array of frames has 2 frames, frames=3 requested"),
        ({"video": clip(2), "frames": 0}, OptionError, "frames: 0 found, expected a whole number of at least 1"),
        ({"video": clip(2), "fps": 0}, OptionError, "fps: 0 found, expected a number above 0"),
        ({"video": clip(2), "fps": "2"}, OptionError, "fps: '2' found, expected a number above 0"),
        ({"video": clip(2), "fps": 2, "frames": 2}, OptionError, "both frames=2 and fps=2 found; pass one"),
        ({"image": picture(), "frames": 2}, OptionError, "frames= and fps= are about a video; pass video="),
    ],
)
def test_bad_videos(arguments: dict[str, Any], error: type[Exception], message: str, models: Models) -> None:
    with pytest.raises(error, match=message):
        models("qwen2_5_vl").answer(**{"image": None, "prompt": QUESTION, **arguments})


def test_families_without_videos(models: Models) -> None:
    with pytest.raises(UnsupportedError, match=r"llava: videos of LLaVA-1.5 are not supported; pass frames as images"):
        models("llava").answer(None, QUESTION, video=clip(2))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_without_torchvision(models: Models) -> None:
    message = r"no part for videos: .* torchvision, which is not installed; .* pip install \"tokenprune-vlm\[video\]\""
    with pytest.raises(UnsupportedError, match=message):
        models("qwen2_vl").answer(None, QUESTION, video=clip(2))


def test_a_processor_that_has_no_part_for_videos(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although torchvision is installed: why it was loaded without one is told."""
    model = models("qwen2_vl")
    monkeypatch.setattr("tokenprune_adapters.hf.inputs.prompts.is_torchvision_available", lambda: True)
    monkeypatch.setattr(model.processor, "video_processor", None, raising=False)
    monkeypatch.setattr(model.processor, "without_videos", "OSError: no such file", raising=False)
    message = r"qwen2_vl: its processor has no part for videos: fetch the checkpoint's files for videos \(OSError: no"
    with pytest.raises(UnsupportedError, match=message):
        model.answer(None, QUESTION, video=clip(2))


def test_videos_that_do_not_go_together(models: Models) -> None:
    with pytest.raises(InputError, match=r"images of 2 frames of 32×24, 4 frames of 32×24 pixels .* \(frames=\)"):
        models("llava_onevision").answer(None, QUESTION, video=[clip(2), clip(4)])


@NEEDS_TORCHVISION
@pytest.mark.parametrize("batch", [False, True])
def test_one_token_for_images_and_videos(batch: bool, models: Models) -> None:
    given: Any = ([picture(), None], ["What?", "Why?"]) if batch else (picture(), "What?")
    with pytest.raises(UnsupportedError, match="images and videos in one call, but one token marks both"):
        models("glm4v").answer(*given, video=[None, clip(4)] if batch else clip(4))


def test_beams_where_a_video_has_lost_tokens() -> None:
    """VideoLLaMA 3: transformers repeats the mask of what is left token by token, but the tokens video by video."""
    model, whole = model_of("video_llama_3"), inputs_of("video_llama_3", "videos")
    assert whole["video_compression_mask"].all()
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    with torch.inference_mode(), tp.prune(model, tp.strategy("random", budget=0.5)):
        got = model.generate(**whole, **options)
        assert torch.equal(model.generate(**whole, **options, use_cache=False), got)
    less = whole["video_compression_mask"].clone()
    less[1] = False
    with (
        torch.inference_mode(),
        tp.prune(model, fastv()),
        pytest.raises(UnsupportedError, match="mixes up the tokens that a video has lost"),
    ):
        model.generate(**{**whole, "video_compression_mask": less}, **options)
