"""Damaged, incomplete and foreign checkpoints: one line that names the thing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lisa_checkpoints import ADDED, State, write_lisa, write_tower

import tokenprune as tp
from tokenprune.errors import CheckpointError
from tokenprune_adapters.lisa import LisaAdapter


def refusal(call: Callable[[], Any]) -> str:
    """The message of the CheckpointError that a call raises, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def refusal_of(folder: Path, **options: Any) -> str:
    return refusal(lambda: LisaAdapter.load(str(folder), **options))


def without(*names: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        for name in names:
            del state[name]

    return edit


def replaced(name: str, *shape: int) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[name] = torch.zeros(shape)

    return edit


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "model.mm_projector.bias",
        "model.mm_projector.weight",
        "model.text_hidden_fcs.0.2.weight",
        "model.visual_model.image_encoder.pos_embed",
        "model.visual_model.image_encoder.neck.3.bias",
        "model.visual_model.image_encoder.blocks.1.attn.rel_pos_h",
        "model.visual_model.image_encoder.blocks.2.norm2.weight",
        "model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "model.visual_model.prompt_encoder.mask_downscaling.4.weight",
        "model.visual_model.mask_decoder.output_hypernetworks_mlps.1.layers.2.bias",
        "model.visual_model.mask_decoder.iou_prediction_head.layers.3.weight",
        "model.visual_model.mask_decoder.transformer.norm_final_attn.weight",
        "model.visual_model.mask_decoder.output_upscaling.1.weight",
    ],
)
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    message = refusal_of(write_lisa(tmp_path, edit=without(name)))
    assert name in message
    assert "missing" in message
    assert str(tmp_path) in message


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
    assert "4 tensors are missing" in refusal_of(write_lisa(tmp_path, edit=without(*names)))


def test_extra_tensor(tmp_path: Path) -> None:
    message = refusal_of(write_lisa(tmp_path, edit=replaced("model.visual_model.image_encoder.blocks.0.spare", 3)))
    assert "1 tensor is unexpected: model.visual_model.image_encoder.blocks.0.spare" in message


def test_extra_tensor_in_a_shard_that_the_index_does_not_list(tmp_path: Path) -> None:
    write_lisa(tmp_path, shards=2, files="pytorch_model.bin", edit=replaced("model.spare", 3))
    index = tmp_path / "pytorch_model.bin.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    del listed["model.spare"]
    index.write_text(json.dumps({"weight_map": listed}))
    assert "unexpected: model.spare" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("model.norm.weight", (31,), "[31], expected [32]"),
        ("model.layers.1.self_attn.k_proj.weight", (32, 32), "[32, 32], expected [16, 32]"),
        ("lm_head.weight", (643, 30), "[643, 30], expected [643, 32]"),
        ("model.text_hidden_fcs.0.2.weight", (30, 32), "[30, 32], expected [32, 32]"),
        ("model.visual_model.image_encoder.pos_embed", (1, 8, 8, 23), "[1, 8, 8, 23], expected [1, 8, 8, 24]"),
    ],
)
def test_misshaped_tensor(tmp_path: Path, name: str, shape: tuple[int, ...], found: str) -> None:
    message = refusal_of(write_lisa(tmp_path, edit=replaced(name, *shape)))
    assert f"mis-shaped: {name} with shape {found}" in message


@pytest.mark.parametrize("name", ["image_encoder.pos_embed", "mask_decoder.mask_tokens.weight"])
def test_tensor_with_too_few_dimensions(tmp_path: Path, name: str) -> None:
    message = refusal_of(write_lisa(tmp_path, edit=replaced("model.visual_model." + name, 7)))
    assert f"model.visual_model.{name}" in message
    assert "[7]" in message


def test_sam_windows_of_two_sizes(tmp_path: Path) -> None:
    name = "model.visual_model.image_encoder.blocks.0.attn.rel_pos_h"
    assert "attention windows of [3, 4] patches" in refusal_of(write_lisa(tmp_path, edit=replaced(name, 7, 8)))


@pytest.mark.parametrize("files", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, files: str, share: float) -> None:
    path = write_lisa(tmp_path, files=files) / files
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    message = refusal_of(tmp_path)
    assert f"{path} ({path.stat().st_size} bytes) is truncated or damaged" in message


def test_shard_that_is_not_there(tmp_path: Path) -> None:
    write_lisa(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "names model-00002-of-00003.safetensors, which is missing" in refusal_of(tmp_path)


def test_index_that_promises_a_tensor_that_no_shard_has(tmp_path: Path) -> None:
    write_lisa(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(listed.values()))
    listed["model.norm.weight"] = first if listed["model.norm.weight"] == second else second
    index.write_text(json.dumps({"weight_map": listed}))
    assert "model.norm.weight" in refusal_of(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    (write_lisa(tmp_path) / "model.safetensors").unlink()
    assert "contains no weights" in refusal_of(tmp_path)


def test_no_such_folder() -> None:
    assert "no such folder" in refusal(lambda: LisaAdapter.load("./not there"))


def test_tokenizer_without_seg(tmp_path: Path) -> None:
    message = refusal_of(write_lisa(tmp_path, added={"<im_start>": 641, "<im_end>": 642}))
    assert "lacks [SEG]" in message


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    assert "embedding table has 643 rows" in refusal_of(write_lisa(tmp_path, added={**ADDED, "<more>": 643}))


def test_missing_tower_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **options: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refusal_of(write_lisa(tmp_path, tower=False))
    assert "'nobody/no-such-tower'" in message
    assert "pass vision_tower=" in message
    message = refusal_of(tmp_path, vision_tower="elsewhere/nothing")
    assert "'elsewhere/nothing'" in message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_on_the_hub_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import huggingface_hub

    files = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    fetched: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(tmp_path)

    listed = ["config.json", "pytorch_model.bin", *([files] if kind == "safetensors" else [])]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: listed)
    write_lisa(tmp_path, files=files)
    assert LisaAdapter.load("somebody/a-lisa").name == "a-lisa"
    small = ["*.json", "*.model", "merges.txt"]
    assert fetched == [small, [*small, f"*.{kind}"]]


def test_config_without_a_tower(tmp_path: Path) -> None:
    message = refusal_of(write_lisa(tmp_path, tower=False, config={"mm_vision_tower": None}))
    assert "names no vision tower; pass vision_tower=" in message


def test_tower_of_another_width(tmp_path: Path) -> None:
    message = refusal_of(write_lisa(tmp_path, edit=replaced("model.mm_projector.weight", 32, 20)))
    assert "features of width 16" in message
    assert "takes 20" in message


def test_tower_of_another_kind(tmp_path: Path) -> None:
    write_lisa(tmp_path)
    config = tmp_path / "vision_tower" / "config.json"
    config.write_text(json.dumps({"model_type": "siglip_vision_model"}))
    assert "'siglip_vision_model', expected a CLIP model" in refusal_of(tmp_path)


def test_truncated_tower(tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "tower") / "model.safetensors"
    tower.write_bytes(tower.read_bytes()[:100])
    message = refusal_of(write_lisa(tmp_path / "lisa", tower=False), vision_tower=tower.parent)
    assert str(tower) in message


def test_another_family_has_no_adapter_here(tmp_path: Path) -> None:
    write_lisa(tmp_path, config={"architectures": ["SomethingForCausalLM"]})
    message = refusal(lambda: tp.load(tmp_path))
    assert "no adapter knows this checkpoint" in message
    assert "SomethingForCausalLM" in message


def test_another_family_with_lisa_asked_for(tmp_path: Path) -> None:
    def without_sam(state: State) -> None:
        for name in [name for name in state if "visual_model" in name]:
            del state[name]

    message = refusal_of(write_lisa(tmp_path, edit=without_sam, config={"architectures": ["GLaMMForCausalLM"]}))
    assert "is no LISA checkpoint" in message
    assert "GLaMMForCausalLM" in message


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_attention_heads": 5}, "config.json"),
        ({"num_attention_heads": 0}, "describes no LLaMA decoder"),
        ({"hidden_size": "wide"}, "describes no LLaMA decoder"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": 3}, "unexpected: model.layers.3."),
        ({"num_hidden_layers": 5}, "missing: model.layers.4."),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, config: dict[str, Any], found: str) -> None:
    assert found in refusal_of(write_lisa(tmp_path, config=config))


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    (write_lisa(tmp_path) / "config.json").write_text(text)
    assert "config.json" in refusal_of(tmp_path)


def test_what_the_hub_client_logs_is_no_part_of_the_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    from tokenprune_adapters.common.checkpoint import resolve_folder

    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logging.getLogger("huggingface_hub").level

    def offline(*asked: Any, **options: Any) -> str:
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"nonsuch/thing: no such folder, and config\.json cannot be fetched"):
        tp.load("nonsuch/thing")
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        resolve_folder("nonsuch/tower")
    assert "Retrying" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == before
