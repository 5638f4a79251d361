"""Loading checkpoints of transformers' own vision-language models, and answering with them."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vlm_configs
from lisa_checkpoints import write_lisa
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Idefics3Processor, SmolVLMProcessor
from vlm_checkpoints import EOS, LOADED, TOKENS, VIDEO_PROCESSORS, begins, marks, write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.cli.app import main
from tokenprune.errors import CheckpointError, IncompatibleError, InputError, OptionError
from tokenprune.plugins import registry
from tokenprune.testing.tiny_checkpoints import write_tiny_llava
from tokenprune_adapters.common.context_length import context_length
from tokenprune_adapters.hf import FAMILIES
from tokenprune_adapters.hf.model import VisionLanguageModel
from tokenprune_adapters.hf.model_support import model_support
from tokenprune_adapters.lisa import LisaModel

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
QUESTION = "What is it?"
Folders = Callable[[str], Path]
Models = Callable[[str], VisionLanguageModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Checkpoint folder of a family, written when it is first asked for; not to be changed."""
    root = tmp_path_factory.mktemp("vlm")
    return lambda name: root / name if (root / name).is_dir() else write_vlm(root / name, name)


@pytest.fixture(scope="module")
def models(folders: Folders) -> Models:
    """The loaded model of a family."""
    return functools.cache(lambda name: tp.load(folders(name)))


@pytest.fixture
def broken(folders: Folders, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be spoilt."""
    return Path(shutil.copytree(folders("llava"), tmp_path / "llava"))


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fastv(budget: float = 0.5) -> Any:
    return tp.strategy("fastv", budget=budget)


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert set(TOKENS) == set(FAMILIES)


# loading and answering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED)
def test_answers_are_those_of_generate(name: str, models: Models) -> None:
    model = models(name)
    assert isinstance(model, VisionLanguageModel)
    assert model.name == name
    assert not model.model.training
    found = model.answer(picture(), QUESTION, max_new_tokens=6)
    assert found.trace is None
    inputs = model.inputs(picture(), QUESTION)
    with torch.inference_mode():
        ids = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found.text == model.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.text

    everything = model.answer(picture(), QUESTION, strategy=tp.strategy("none"), max_new_tokens=6)
    assert everything.text == found.text
    assert everything.trace is not None

    pruned = model.answer(picture(), QUESTION, strategy=fastv(), max_new_tokens=6)
    assert pruned.trace is not None
    ledger = pruned.trace.ledger
    assert ledger.image_tokens == everything.trace.ledger.image_tokens
    assert 0 < ledger.equivalent_tokens_ratio <= 0.5
    assert model.answer(picture(), QUESTION, max_new_tokens=6) == found  # nothing is left behind


@pytest.mark.parametrize("name", LOADED)
def test_the_prompt_is_what_the_chat_template_makes_of_it(name: str, models: Models) -> None:
    model = models(name)
    inputs = model.inputs(picture(), QUESTION)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(vlm_configs.BOS) == begins(name)
    text = model.processor.decode(ids, skip_special_tokens=True)
    assert QUESTION in text
    if name == "paligemma":  # no template: images first
        assert ids[: ids.index(vlm_configs.BOS)] == [vlm_configs.IMAGE] * 16
    if not getattr(model.processor, "chat_template", None):
        return
    assert text.startswith("USER: ")
    assert text.endswith("ASSISTANT:")
    if name != "smolvlm":  # Idefics3's processor, which stands in for SmolVLM's, does not know `image` as a part
        content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
        whole = model.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        assert whole["input_ids"].tolist() == [ids]


@pytest.mark.parametrize("name", LOADED)
def test_several_images_and_a_prompt_with_its_own_placeholders(name: str, models: Models) -> None:
    model = models(name)
    one = model.answer(picture(), QUESTION, strategy=fastv(), max_new_tokens=1).trace
    pair = [picture(), picture(32, 32, seed=1)]
    two = model.answer(pair, "Are they the same?", strategy=fastv(), max_new_tokens=1).trace
    assert one is not None
    assert two is not None
    if name != "llava_onevision":  # which takes a single crop of each where there are several
        assert two.ledger.image_tokens[0] > one.ledger.image_tokens[0]
    mark = marks(name)
    written = f"{mark}{mark}Are they the same?" if name == "paligemma" else f"Is {mark} the same as {mark}?"
    if name == "pp_chart2table":  # whose processor leaves the image tokens to the chat template
        with pytest.raises(InputError, match="has <imgpad> in it, which the processor writes itself"):
            model.inputs(pair, written)
        return
    inputs = model.inputs(pair, written)
    assert "USER" not in model.processor.decode(inputs["input_ids"][0])
    assert model.answer(pair, written, strategy=fastv(), max_new_tokens=1).trace is not None


def test_dtype_and_options_reach_transformers(folders: Folders) -> None:
    model = tp.load(folders("llava"), dtype="bfloat16", attn_implementation="eager")
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    assert model.base_model.language_model.config._attn_implementation == "eager"
    assert model.answer(picture(), QUESTION, strategy=fastv(), max_new_tokens=2).trace is not None
    assert tp.load(folders("llava")).model.dtype == torch.float32


@pytest.mark.parametrize("image", ["path", "array", "tensor"])
def test_images_of_any_kind(image: str, models: Models, tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.png")
    pixels = np.array(picture())
    given = {"path": tmp_path / "photo.png", "array": pixels, "tensor": torch.from_numpy(pixels).permute(2, 0, 1)}
    model = models("llava")
    expected = model.inputs(picture(), QUESTION)["pixel_values"]
    assert torch.equal(model.inputs(given[image], QUESTION)["pixel_values"], expected)


# processors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [one for one in LOADED if one.values[0] not in {*VIDEO_PROCESSORS, "shieldgemma2"}])
def test_the_processor_is_transformers_own(name: str, folders: Folders, models: Models) -> None:
    own = AutoProcessor.from_pretrained(folders(name))
    assert type(models(name).processor) is type(own)


@pytest.mark.parametrize("name", [one for one in LOADED if one.values[0] in VIDEO_PROCESSORS])
def test_processors_that_take_videos_take_images_in_any_case(name: str, models: Models, folders: Folders) -> None:
    without_file = folders(name).parent / f"{name}-without-video-file"
    if not without_file.is_dir():
        shutil.copytree(folders(name), without_file)
        (without_file / "video_preprocessor_config.json").unlink()
    found = tp.load(without_file).inputs(picture(), QUESTION)
    expected = models(name).inputs(picture(), QUESTION)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 2), (3, 4)])
def test_smolvlm_and_idefics3_write_an_image_alike(rows: int, columns: int) -> None:
    """So that Idefics3's processor may stand in for SmolVLM's where its packages for videos are not installed."""
    tokens = {"fake_image_token": "<f>", "image_token": "<i>", "global_image_token": "<g>", "global_image_tag": "<g>"}
    own, seen = SimpleNamespace(image_seq_len=4, **tokens), {"rows": [[rows]], "cols": [[columns]]}
    smol, idefics = (kind.replace_image_token(own, seen, 0) for kind in (SmolVLMProcessor, Idefics3Processor))
    assert smol == idefics
    assert smol.count("<i>") == 4 * (rows * columns + 1)


def test_no_processor_in_the_folder(broken: Path) -> None:
    for path in broken.iterdir():
        if path.name not in ("config.json", "generation_config.json") and path.suffix != ".safetensors":
            path.unlink()
    model = tp.load(broken)  # weights alone are enough to prune the model
    with pytest.raises(CheckpointError, match=r"its processor cannot be loaded .*fetch the processor's files"):
        model.answer(picture(), QUESTION)


# what is refused -----------------------------------------------------------------------------------------------------


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_missing_weights_are_named(broken: Path) -> None:
    tensors = load_file(weights(broken))
    name = next(name for name in tensors if name.endswith("layers.2.self_attn.q_proj.weight") and "language" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, weights(broken), {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors? (is|are) missing \(.*layers\.2\.self_attn\.q_proj\.weight"):
        tp.load(broken)


def test_mis_shaped_weights(broken: Path) -> None:
    tensors = load_file(weights(broken))
    name = next(name for name in tensors if name.endswith("layers.2.self_attn.q_proj.weight") and "language" in name)
    save_file({**tensors, name: tensors[name][:-2].clone()}, weights(broken), {"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        tp.load(broken)


@pytest.mark.parametrize("left", [0, 1000])
def test_damaged_weights(broken: Path, left: int) -> None:
    weights(broken).write_bytes(weights(broken).read_bytes()[:left])
    with pytest.raises(CheckpointError, match=rf"{broken.name} cannot be loaded"):
        tp.load(broken)


def test_no_weights(broken: Path) -> None:
    weights(broken).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(OSError: .*no file named model\.safetensors"):
        tp.load(broken)


def test_a_missing_shard(folders: Folders, tmp_path: Path, models: Models) -> None:
    models("llava").model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert isinstance(tp.load(tmp_path), VisionLanguageModel)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        tp.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_tower": "clip"}, "transformers models have no load option 'vision_tower'"),
        ({"dtpye": "float32"}, "did you mean 'dtype'"),
        ({"dtype": "int8"}, "dtype 'int8' found, expected one of float32"),
        ({"device": "gpu7"}, "device 'gpu7' is unknown"),
        ({"device": "cpu", "device_map": "auto"}, "both device= and device_map="),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, folders: Folders) -> None:
    with pytest.raises(OptionError, match=message):
        tp.load(folders("llava"), **options)


def test_checkpoints_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}'
    )
    with pytest.raises(
        CheckpointError, match=re.escape(f"{tmp_path} (model_type 'blip-2') is not supported: ")
    ) as caught:
        tp.load(tmp_path)
    assert model_support("blip-2")[0].reason in str(caught.value)


@pytest.mark.parametrize("config", [{"model_type": "car", "architectures": ["Car"]}, {}])
def test_checkpoints_that_no_adapter_knows(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        tp.load(tmp_path)
    message = str(caught.value)
    assert f"model_type {config.get('model_type')!r}" in message
    assert "no adapter knows this checkpoint" in message
    assert all(name in message for name in ("transformers", "lisa", "glamm", "pixellm"))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no config\.json"):
        tp.load(tmp_path)


def test_lisa_whose_model_type_is_llava_too_stays_with_its_adapter(tmp_path: Path) -> None:
    folder = write_lisa(tmp_path / "LISA")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    assert isinstance(tp.load(folder), LisaModel)


@pytest.mark.parametrize(
    ("image", "prompt", "message"),
    [
        ("photo", "", "expected a text about the image"),
        ("photo", "  \n", "expected a text about the image"),
        ("photo", None, "prompt None found"),
        ("nowhere.png", QUESTION, "no such file"),
        (7, QUESTION, "image is a int"),
        (np.zeros((4, 4, 7)), QUESTION, r"shape \[4, 4, 7\]"),
        ([], QUESTION, "an empty list of images"),
        (["photo", None], QUESTION, "image is a NoneType"),
        ("photo", "<image> and <image>?", "has 2 placeholders <image>, but there are 1 images"),
        (["photo", "photo"], "<image>?", "has 1 placeholders <image>, but there are 2 images"),
    ],
)
def test_bad_inputs(image: Any, prompt: Any, message: str, models: Models) -> None:
    def given(one: Any) -> Any:
        return picture() if isinstance(one, str) and one == "photo" else one

    with pytest.raises(InputError, match=message):
        models("llava").answer([given(one) for one in image] if isinstance(image, list) else given(image), prompt)


def test_no_image_file(models: Models, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture")
    with pytest.raises(InputError, match="is not an image"):
        models("llava").answer(tmp_path / "note.png", QUESTION)


def test_no_new_tokens(models: Models) -> None:
    with pytest.raises(OptionError, match="max_new_tokens: 0 found"):
        models("llava").answer(picture(), QUESTION, max_new_tokens=0)


def test_a_strategy_that_does_not_fit(models: Models) -> None:
    model = models("qwen2_vl")
    with pytest.raises(IncompatibleError, match="use positions='keep'"):
        model.answer(picture(), QUESTION, strategy=tp.strategy("prumerge", budget=0.5))
    kept = model.answer(picture(), QUESTION, strategy=tp.strategy("prumerge", budget=0.5, positions="keep"))
    assert kept.trace is not None


def test_prune_takes_the_loaded_model(models: Models) -> None:
    model = models("gemma3")
    inputs = model.inputs(picture(), QUESTION)
    with torch.inference_mode(), tp.prune(model, fastv()) as pruning:
        ids = model.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert pruning.trace.ledger.image_tokens == (9,)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert EOS not in new
    assert model.answer(picture(), QUESTION, strategy=fastv(), max_new_tokens=4).text == model.processor.decode(new)


# command line --------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and last line of stderr."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, (captured.err.strip().splitlines() or [""])[-1]


def test_the_list_shows_the_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "list")
    assert code == 0
    assert "transformers" in registry.adapters()
    assert "LLaVA, Qwen-VL, InternVL" in " ".join(out.split())


@pytest.mark.parametrize("name", ["segment", "inspect", "compare"])
def test_commands_that_need_masks_say_so(
    name: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture().save(tmp_path / "photo.png")
    words: dict[str, list[object]] = {
        "segment": [tmp_path / "photo.png", "it", "--out", tmp_path / "mask.png"],
        "inspect": [tmp_path / "photo.png", "it", "--out", tmp_path / "sheet.png"],
        "compare": ["--limit", 1],
    }
    code, out, error = command(capsys, name, *words[name], "--model", folders("llava"))
    assert (code, out) == (2, "")
    assert error.startswith("error: model ")
    assert "is a VisionLanguageModel, which makes no masks; choose a segmentation model, or for answers" in error


def test_an_answer_within_a_context_tells_of_the_pruning(models: Models) -> None:
    image = picture()
    model, strategy = models("llava"), tp.strategy("fastv", budget=0.5)
    alone = model.answer(image, QUESTION, strategy, max_new_tokens=6)
    with tp.prune(model, strategy) as run:
        within = model.answer(image, QUESTION, max_new_tokens=6)
        assert within.text == alone.text
        assert within.trace is run.trace
    assert repr(within) == repr(alone)
    assert within.trace.stages[0].kept == alone.trace.stages[0].kept  # type: ignore[union-attr]
    assert model.answer(image, QUESTION, max_new_tokens=2).trace is None


def test_a_loaded_model_is_two_lines(models: Models) -> None:
    first, second = repr(models("llava")).splitlines()
    assert first == "VisionLanguageModel 'llava': LlavaForConditionalGeneration on cpu"
    assert ".answer(image, prompt, strategy)" in second


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_prompt_beyond_the_models_context_is_refused(models: Models, name: str) -> None:
    with pytest.raises(InputError, match=r"the prompt has \d+ positions, .*maximum is 512"):
        models(name).answer(picture(), "What is it? " * 200)


def test_contexts_are_stretched_as_configs_say() -> None:
    def limit(known: int | None, **rope: Any) -> int | None:
        return context_length(SimpleNamespace(max_position_embeddings=known, rope_parameters=rope))

    assert limit(None) is None
    assert limit(512, rope_type="default") == 512
    assert limit(512, rope_type="linear", factor=4.0) == 2048
    assert limit(131072, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192) == 131072
    assert limit(512, rope_type="dynamic", factor=2.0) is None
    assert limit(512, full_attention={"rope_type": "linear", "factor": 8.0}, sliding_attention={}) == 4096
    assert context_length(SimpleNamespace(max_position_embeddings=64, rope_scaling=None)) == 64


def test_the_tiny_checkpoint_for_trying_things(tmp_path: Path) -> None:
    model = tp.load(write_tiny_llava(tmp_path / "tiny", layers=3, side=16))
    again = tp.load(write_tiny_llava(tmp_path / "again", layers=3, side=16))
    said = model.answer(picture(), QUESTION, tp.strategy("fastv", keep=5), max_new_tokens=4)
    assert (said.trace.ledger.image_tokens, len(said.trace.ledger.entries)) == ((16,), 3)  # type: ignore[union-attr]
    assert [entry.image for entry in said.trace.ledger.entries] == [(16,), (16,), (5,)]  # type: ignore[union-attr]
    assert again.answer(picture(), QUESTION, tp.strategy("fastv", keep=5), max_new_tokens=4).text == said.text
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "tiny").tokenizer.pad_token, str)
