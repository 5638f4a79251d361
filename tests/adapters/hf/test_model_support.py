"""Which types of transformers' mapping are supported, and that the reasons for the others are true."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

from tokenprune.cli.app import main
from tokenprune.engine.decoder import find_decoder, other_layers
from tokenprune.errors import UnsupportedError
from tokenprune.loading.model_support import STATUSES, supported_models
from tokenprune_adapters.hf import FAMILIES
from tokenprune_adapters.hf.model_support import (
    CROSS_ATTENTION,
    ENCODER_DECODER,
    NO_ROTARY,
    OTHER_NAMES,
    REASONS,
    UNTESTED,
    model_support,
    told_by_config,
)

INSTALLED = [kind for kind in REASONS if kind in MAPPING]


def default_model(kind: str) -> torch.nn.Module:
    """A model of the default configuration, without memory."""
    with torch.device("meta"):
        made: torch.nn.Module = getattr(transformers, MAPPING[kind])(CONFIG_MAPPING[kind]())
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
        ("llama4", "layers of type chunked_attention"),
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
    assert told_by_config(kind) is None


def test_types_that_nothing_tells_of_are_called_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAPPING, "new_model", "NewModelForConditionalGeneration")
    assert model_support("new_model")[0].reason == UNTESTED
