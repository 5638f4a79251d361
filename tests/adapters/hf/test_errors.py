"""What `prune` says of transformers' vision-language models and inputs that do not fit, and when."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from vlm_configs import IMAGE, TEXT, TEXT_MODEL
from vlm_families import FAMILIES, READABLE
from vlm_known import MROPE, TOWERS, WITH_VIDEO, model_of
from vlm_video_configs import hunyuan_vl
from vlm_watching import Half, Reader, inputs_of, mixed, read

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import Pixels, TowerFeatures
from tokenprune.core.stage import Stage
from tokenprune.errors import IncompatibleError, InputError, PluginError, UnsupportedError
from tokenprune_adapters.hf import adapter, model_support
from tokenprune_adapters.hf.families import FAMILIES as KNOWN
from tokenprune_adapters.hf.families import FOUR_AXES

names = pytest.mark.parametrize("name", READABLE)


def without_pixels(inputs):
    return {key: inputs[key] for key in inputs if key in ("input_ids", "attention_mask") or "token_type_ids" in key}


def fails(kind, *words):
    """Expects an error with all these words in its message."""
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words))


@names
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_placeholders_that_do_not_match_the_images(name, call):
    model, inputs = model_of(name), inputs_of(name)
    total = int(FAMILIES[name].image_tokens(inputs).sum())
    ids = inputs["input_ids"].clone()
    ids[1, (ids[1] == IMAGE).nonzero()[0]] = TEXT.start
    run = model.generate if call == "generate" else model
    words = f"has {total - 1} image tokens", f"have {total} features", "processor", type(model.model).__name__
    with torch.no_grad(), fails(InputError, *words), tokenprune.prune(model, Half()):
        run(**{**inputs, "input_ids": ids}, **({"max_new_tokens": 2} if call == "generate" else {}))


@names
def test_placeholders_without_pixels(name):
    model, inputs = model_of(name), inputs_of(name)
    total = int(FAMILIES[name].image_tokens(inputs).sum())
    words = f"{total} image tokens", "no image was encoded", "pass the pixels", "image_tokens="
    with torch.no_grad(), fails(InputError, *words), tokenprune.prune(model, Half()):
        model(**without_pixels(inputs))


@names
def test_embeddings_alone_do_not_tell_where_image_tokens_are(name):
    model, inputs = model_of(name), inputs_of(name)
    embeddings = torch.randn(*inputs["input_ids"].shape, TEXT_MODEL["hidden_size"])
    words = type(model.model).__name__, "without input_ids", "image_tokens="
    with torch.no_grad(), fails(InputError, *words), tokenprune.prune(model, Half()):
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])


def test_families_that_are_not_known_are_refused_with_the_reason_that_is_listed():
    with torch.device("meta"):
        model = transformers.BlipForConditionalGeneration(transformers.BlipConfig())
    (listed,) = model_support.model_support("blip")
    words = "BlipForConditionalGeneration", "'blip'", "list --models", listed.reason
    with fails(UnsupportedError, *words), tokenprune.prune(model, Half()):
        pass


@pytest.mark.parametrize("found", ["4.56.0", "4.57.6"])
def test_older_releases_are_refused_with_what_is_needed(found, monkeypatch, tmp_path):
    """Where marks are given, the core still prunes."""
    model, inputs = model_of("llava"), inputs_of("llava")
    monkeypatch.setattr(adapter.transformers, "__version__", found)
    words = f"transformers {found}", "5.0", "image_tokens="
    with fails(UnsupportedError, type(model).__name__, *words), tokenprune.prune(model, Reader()):
        pass
    config = {"model_type": "llava", "architectures": [type(model).__name__]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with fails(UnsupportedError, str(tmp_path), *words):
        tokenprune.load(str(tmp_path))
    marks = FAMILIES["llava"].image_tokens(inputs)
    with torch.no_grad(), tokenprune.prune(model, Reader(), image_tokens=marks) as run:
        model(**inputs)
    assert torch.equal(run.trace.layout.image_tokens, marks)


@pytest.mark.parametrize("found", ["5.0.0", "5.0.0rc1", "5.7.0.dev0", "10.1.0"])
def test_later_releases_are_not_refused(found, monkeypatch):
    monkeypatch.setattr(adapter.transformers, "__version__", found)
    with tokenprune.prune(model_of("llava"), Reader()):
        pass


def test_a_plain_language_model_is_asked_for_prompt_masks():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT_MODEL))
    with fails(InputError, "LlamaForCausalLM", "image_tokens="), tokenprune.prune(model, Half()):
        pass


@pytest.mark.parametrize("value", ["deleted", None])
@names
def test_a_model_without_its_tower(name, value):
    model = FAMILIES[name].build()
    part = next(part for part in TOWERS if hasattr(model.model, part))
    if value is None:
        setattr(model.model, part, None)
    else:
        delattr(model.model, part)
    with fails(UnsupportedError, type(model.model).__name__, part), tokenprune.prune(model, Half()):
        pass


@names
def test_strategies_that_read_pixels_are_refused_before_anything_runs(name):
    words = "'reader'", type(model_of(name).model).__name__, "requires Pixels", "TowerFeatures"
    with fails(IncompatibleError, *words), tokenprune.prune(model_of(name), Reader(Pixels())):
        pytest.fail("the context was opened")


@names
def test_renumbering_is_refused_on_multimodal_positions_only(name):
    model, inputs, strategy = model_of(name), inputs_of(name), Half()
    strategy.positions = "renumber"
    if name.startswith(MROPE):
        with fails(IncompatibleError, "'half'", "multimodal", "positions='keep'"), tokenprune.prune(model, strategy):
            pytest.fail("the context was opened")
    else:
        _, trace = read(model, strategy, inputs)
        assert trace.policies["positions"] == "renumber"


@pytest.mark.parametrize("name", [name for name in WITH_VIDEO if KNOWN[name].one_token])
def test_images_beside_videos_are_refused_where_one_token_marks_both(name):
    model, inputs = model_of(name), mixed(name)
    with torch.no_grad(), pytest.raises(ValueError, match="do not match"):  # without pruning too
        model(**inputs)
    with pytest.raises(UnsupportedError, match="images and videos in one call, but one token marks both"):
        read(model, Half(), inputs)


def test_positions_that_restart_in_every_image_look_like_packed_prompts():
    """HunYuan-VL with three axes, none of which counts through the sequence."""
    model = replace(FAMILIES["hunyuan_vl"], config=partial(hunyuan_vl, 2, 1, 1)).build()
    with torch.no_grad(), fails(UnsupportedError, "packed into one row"), tokenprune.prune(model, Half()):
        model(**inputs_of("hunyuan_vl"))
    assert FOUR_AXES in KNOWN["hunyuan_vl"].limits


@pytest.mark.parametrize("name", [name for name in READABLE if name not in WITH_VIDEO])
def test_videos_are_refused_where_the_family_has_none(name):
    model, inputs = model_of(name), inputs_of(name)
    words = type(model.model).__name__, "video", "images only"
    with torch.no_grad(), fails(UnsupportedError, *words), tokenprune.prune(model, Half()):
        model(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 16, 16))


@names
def test_contexts_do_not_nest(name):
    model, inputs = model_of(name), inputs_of(name)
    with torch.no_grad(), tokenprune.prune(model, Half()) as run:
        with fails(UnsupportedError, "already", "nest"), tokenprune.prune(model.model, Half()):
            pass
        model(**inputs)
    assert len(run.trace.stages) == 2


def test_reads_that_appear_only_at_a_real_shape_are_named():
    """Stages are asked for a typical shape when the context opens; what they read must not depend on it."""

    class Late(Reader):
        def stages(self, shape):
            return [Stage("read", 0, reads=(TowerFeatures(),) if shape.image_tokens < 100 else ())]

        def choose(self, stage, tokens):
            return Keep.where(tokens.active & (tokens.features.sum(-1) > 0))

    with torch.no_grad(), fails(PluginError, "TowerFeatures", "declare"), tokenprune.prune(model_of("llava"), Late()):
        model_of("llava")(**inputs_of("llava"))


@pytest.mark.parametrize("option", [{"norm_after": True}, {"rope_scaling_layers": [0, 1]}], ids=str)
def test_layers_that_would_be_read_or_renumbered_wrongly_are_refused(option):
    """Of Molmo 2: norms after attention, and two kinds of rotary embeddings."""
    FAMILIES["molmo2"].build()  # skips where an older release has none
    config = FAMILIES["molmo2"].config()
    for name, value in option.items():
        setattr(config.text_config, name, value)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with fails(UnsupportedError, "Molmo2Model", *option), tokenprune.prune(model, Half()):
        pass
