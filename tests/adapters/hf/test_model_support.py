"""Which types of transformers' mapping are supported, and that the reasons for the others are true."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

import tokenprune as tp
from tokenprune.cli.app import main
from tokenprune.engine.decoder import find_decoder, other_layers
from tokenprune.errors import UnsupportedError
from tokenprune.loading.model_support import STATUSES, supported_models
from tokenprune_adapters.hf import FAMILIES
from tokenprune_adapters.hf.families import NO_PER_LAYER
from tokenprune_adapters.hf.model_support import (
    CROSS_ATTENTION,
    DIFFUSION,
    ENCODER_DECODER,
    NO_ROTARY,
    OTHER_NAMES,
    PROTEINS,
    REASONS,
    TWO_DECODERS,
    UNTESTED,
    model_support,
    told_by_config,
)

INSTALLED = [kind for kind in REASONS if kind in MAPPING]


def default_model(kind: str) -> torch.nn.Module:
    """A model of the default configuration, without memory."""
    experts = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    lacking = {"text_config": experts} if kind == "diffusion_gemma" else {}  # of which the default has none
    with torch.device("meta"):
        made: torch.nn.Module = getattr(transformers, MAPPING[kind])(CONFIG_MAPPING[kind](**lacking))
    return made


def test_every_type_of_the_installed_release_is_listed_once() -> None:
    listed = model_support()
    assert [one.model_type for one in listed] == list(MAPPING)
    assert {one.status for one in listed} <= {"supported", "limited", "refused"}
    assert all(bool(one.reason) == (one.status != "supported") for one in listed)
    assert {one.model_type for one in listed if one.status != "refused"} == set(FAMILIES) & set(MAPPING)


def test_one_type_is_told_as_in_the_list() -> None:
    assert model_support("mllama") == [one for one in model_support() if one.model_type == "mllama"]
    assert model_support("car") == []


def test_the_command_prints_what_adapters_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["list", "--models", "--format", "json"])
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    said = [{"model_type": one.model_type, "status": one.status, "reason": one.reason} for one in supported_models()]
    assert printed == said
    assert {entry["model_type"] for entry in printed} >= set(MAPPING)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(["list", "--models"])
    assert not ended.value.code
    table = capsys.readouterr().out
    assert all(kind in table for kind in MAPPING)
    assert CROSS_ATTENTION in table
    counts = Counter(one.status for one in supported_models())
    assert table.splitlines()[-1] == ", ".join(f"{counts[status]} {status}" for status in STATUSES)


def test_models_and_plugins_are_not_listed_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["list", "--models", "--plugins"])
    assert ended.value.code == 2
    assert "both --plugins and --models" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [kind for kind in INSTALLED if REASONS[kind] in (NO_ROTARY, OTHER_NAMES)])
def test_decoders_without_a_rotary_embedding_or_with_other_names_are_not_found(kind: str) -> None:
    model = default_model(kind)
    with pytest.raises(UnsupportedError, match="expected exactly one decoder"):
        find_decoder(model)
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    text = [name for name, _ in model.named_modules() if "vision" not in name]
    assert any("rotary" in name for name in text) == (REASONS[kind] == OTHER_NAMES), names


@pytest.mark.parametrize("kind", [kind for kind in INSTALLED if REASONS[kind] == CROSS_ATTENTION])
def test_text_layers_with_cross_attention_have_it(kind: str) -> None:
    names = {part for name, _ in default_model(kind).named_modules() for part in name.split(".")}
    assert names & {"crossattention", "cross_attn"}


@pytest.mark.skipif("minimax_m3_vl" not in MAPPING, reason="an older release of transformers")
def test_layers_with_an_indexer_are_told_by_a_checkpoints_configuration() -> None:
    sparse = {"sparse_attention_config": {"sparse_attention_freq": [0, 1]}, "num_hidden_layers": 2}
    config = CONFIG_MAPPING["minimax_m3_vl"](text_config=sparse)
    assert other_layers(config.get_text_config(decoder=True)) == ["minimax_m3_sparse"]
    with torch.device("meta"):
        model = getattr(transformers, MAPPING["minimax_m3_vl"])(config)
    with pytest.raises(UnsupportedError, match="has layers of type minimax_m3_sparse"):
        find_decoder(model)
    assert any("indexer" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("florence2", ENCODER_DECODER),
        ("mllama", CROSS_ATTENTION),
        ("qwen4_exp", "layers of type indexed_attention"),
        ("gemma3n", "layers that attend to the keys of earlier layers"),
        ("llava", None),
        ("car", None),
    ],
)
def test_what_a_default_configuration_tells(kind: str, reason: str | None) -> None:
    told = told_by_config(kind)
    assert (told is None) if reason is None else reason in (told or "")


@pytest.mark.parametrize("kind", [kind for kind in MAPPING if kind in FAMILIES])
def test_supported_types_have_no_reason_against_them(kind: str) -> None:
    assert kind not in REASONS
    refused = NO_PER_LAYER in FAMILIES[kind].limits  # models of the default configuration
    assert (told_by_config(kind) is not None) == refused


@pytest.mark.parametrize("kind", [kind for kind in ("gemma3n", "gemma4") if kind in MAPPING])
def test_decoders_whose_layers_depend_on_more_than_their_input_are_refused_by_hand_too(kind: str) -> None:
    with torch.device("meta"):
        text = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]().get_text_config())
    marks = torch.zeros(1, 8, dtype=torch.bool)
    told = f"{type(text.model).__name__} has layers that (take a further input|attend to the keys of earlier layers)"
    with pytest.raises(UnsupportedError, match=told), tp.prune(text, tp.strategy("fastv"), image_tokens=marks):
        pytest.fail("the context was opened")


@pytest.mark.parametrize("kind", [kind for kind in INSTALLED if REASONS[kind] in (TWO_DECODERS, DIFFUSION)])
def test_models_of_two_decoders_have_two(kind: str) -> None:
    model = default_model(kind)
    with pytest.raises(UnsupportedError, match=r"expected exactly one decoder .*, found \w+, \w+"):
        find_decoder(model)
    assert not isinstance(model, transformers.GenerationMixin)


@pytest.mark.parametrize("kind", [kind for kind in INSTALLED if REASONS[kind] == PROTEINS])
def test_a_model_of_proteins_takes_no_pixels(kind: str) -> None:
    names = inspect.signature(getattr(transformers, MAPPING[kind]).forward).parameters
    assert "protein_input_ids" in names
    assert not [name for name in names if "pixel" in name or "image" in name]


def test_types_that_nothing_tells_of_are_called_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAPPING, "new_model", "NewModelForConditionalGeneration")
    assert model_support("new_model")[0].reason == UNTESTED


def test_the_readme_counts_the_types():
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    told = re.search(r"(\d+) of the (\d+) image-text types of `transformers` ([\d.]+), (\d+) of them with limits", text)
    assert told is not None
    if not transformers.__version__.startswith(f"{told[3]}."):
        pytest.skip(f"the README counts those of transformers {told[3]}, not of {transformers.__version__}")
    status = Counter(one.status for one in model_support())
    assert [int(told[n]) for n in (1, 2, 4)] == [status.total() - status["refused"], status.total(), status["limited"]]
