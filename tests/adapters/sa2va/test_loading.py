"""Loading Sa2VA checkpoints, and refusing what is none that is supported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lisa_checkpoints import write_lisa
from sa2va_checkpoints import (
    ADDED,
    BYTES,
    LANGUAGE,
    LARGE,
    SAM,
    SEG_ID,
    TOWER,
    TRUNK,
    State,
    sam_shapes,
    state_dict,
    video_shapes,
    write_sa2va,
)
from torch import Tensor

import tokenprune as tp
from tokenprune.errors import CheckpointError, OptionError, UnsupportedError
from tokenprune_adapters.common.checkpoint import Checkpoint
from tokenprune_adapters.sa2va import Sa2vaAdapter, Sa2vaModel
from tokenprune_adapters.sa2va.sam2 import build_sam2, original_name
from tokenprune_adapters.sa2va.stored import Rearranged
from tokenprune_adapters.sa2va.tower import stored_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sa2va(tmp_path_factory.mktemp("sa2va") / "tiny-sa2va")


@pytest.fixture(scope="module")
def model(folder: Path) -> Sa2vaModel:
    loaded: Sa2vaModel = tp.load(folder)
    return loaded


def loaded_tensors(model: Sa2vaModel) -> State:
    """The model's tensors under the released names, those joined that are stored joined."""
    found: State = {}
    for prefix, part in (("mlp1.", model.projector), ("text_hidden_fcs.", model.mask_projection)):
        found.update({prefix + name: tensor for name, tensor in part.state_dict().items()})
    found.update({LANGUAGE + name: tensor for name, tensor in model.decoder.state_dict().items()})
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.tower.state_dict().items():
        stored = stored_name(name)
        for part in "qkv":
            if f".attn.qkv.{part}." in stored:
                fused.setdefault(stored.replace(f".qkv.{part}.", ".qkv."), {})[part] = tensor
                break
        else:
            found[stored] = tensor
    found.update({name: torch.cat([parts[part] for part in "qkv"]) for name, parts in fused.items()})
    for name, tensor in model.sam.state_dict().items():
        stored = SAM + original_name(name)
        if stored.endswith("point_embeddings.weight"):
            found.update({stored.replace("weight", f"{i}.weight"): row[None] for i, row in enumerate(tensor)})
        elif stored in found:
            assert torch.equal(found[stored], tensor)  # both copies of the matrix of positions
        else:
            found[stored] = tensor
    return found


def test_every_tensor_arrives_under_its_name(model: Sa2vaModel) -> None:
    found, stored = loaded_tensors(model), state_dict()
    left_out = {SAM + name for name in video_shapes()}
    assert found.keys() == stored.keys() - left_out
    assert [name for name in found if not torch.equal(found[name], stored[name])] == []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.is_meta] == []
    assert not model.training


def test_sizes_come_from_the_weights(model: Sa2vaModel) -> None:
    vision = model.sam.config.vision_config.backbone_config
    assert vision.blocks_per_stage == [1, 1, 2, 1]
    assert vision.embed_dim_per_stage == [8, 16, 32, 64]
    assert vision.num_attention_heads_per_stage == [1, 2, 4, 8]
    decoder = model.sam.config.mask_decoder_config
    assert (decoder.hidden_size, decoder.mlp_dim, decoder.num_attention_heads) == (32, 40, 4)
    assert (decoder.iou_head_hidden_dim, decoder.attention_downsample_rate) == (20, 2)
    assert (model.side, model.tile_side, model.max_tiles, model.name) == (16, 2, 12, "tiny-sa2va")
    assert model.decoder.config.rope_parameters["rope_theta"] == 1e6
    assert next(model.tower.parameters()).dtype == torch.float32


class _Shapes(Checkpoint):
    """A checkpoint of shapes alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes = Path("large"), shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str, dims: int | None = None) -> tuple[int, ...]:
        return self.shapes[name]


def test_the_released_sam_fits() -> None:
    """Names and shapes are those of the authors' class; see `LARGE`."""
    checkpoint = Rearranged(_Shapes({SAM + name: shape for name, shape in sam_shapes(LARGE).items()}))
    part = build_sam2(checkpoint, {})
    shapes = {part.names[name]: tuple(tensor.shape) for name, tensor in part.module.state_dict().items()}
    assert shapes == {name: checkpoint.shape(name) for name in checkpoint.names()}
    trunk = part.module.config.vision_config.backbone_config
    assert (trunk.num_attention_heads_per_stage, trunk.window_size_per_stage) == ([2, 4, 8, 16], [8, 4, 16, 8])
    assert (trunk.global_attention_blocks, trunk.image_size, trunk.mlp_ratio) == ([23, 33, 43], [1024, 1024], 4.0)
    assert part.module.config.mask_decoder_config.num_attention_heads == 8


def test_matches_by_architecture_and_runs_no_code(folder: Path) -> None:
    assert Sa2vaAdapter.matches("x", {"architectures": ["Sa2VAChatModel"]})
    assert not Sa2vaAdapter.matches("x", {"architectures": ["InternVLChatModel"]})
    assert not list(folder.glob("*.py"))  # which config.json names


def test_other_files_and_a_shared_head(tmp_path: Path, model: Sa2vaModel) -> None:
    def shared(state: State) -> None:
        del state["language_model.lm_head.weight"]

    loaded = tp.load(
        write_sa2va(
            tmp_path, files="pytorch_model.bin", edit=shared, config={"llm_config": {"tie_word_embeddings": True}}
        ),
        dtype="bfloat16",
        max_tiles=3,
    )
    assert loaded.decoder.lm_head.weight is loaded.decoder.model.embed_tokens.weight
    assert (loaded.decoder.dtype, loaded.sam.dtype, loaded.max_tiles) == (torch.bfloat16, torch.bfloat16, 3)
    assert torch.equal(loaded.decoder.model.embed_tokens.weight, model.decoder.model.embed_tokens.weight.bfloat16())
    image = torch.linspace(0, 1, 3 * 20 * 30).reshape(3, 20, 30)
    result = loaded.segment(image, "the cat", tp.strategy("none"))
    wanted = model.segment(image, "the cat").low_res_logits
    assert (result.masks.shape, result.low_res_logits.dtype) == ((1, 20, 30), torch.bfloat16)
    assert (result.low_res_logits.float() - wanted).abs().max() < 0.2 * wanted.abs().max()


def test_options(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="contain their tower; leave it out"):
        tp.load(folder, vision_tower=tmp_path)
    with pytest.raises(OptionError, match="max_tiles"):
        tp.load(folder, max_tiles=0)
    with pytest.raises(OptionError, match="max_tiles: 1000000000 found, expected at most 256"):
        tp.load(folder, max_tiles=10**9)
    with pytest.raises(OptionError, match="Sa2VA models have no load option 'tiles'"):
        tp.load(folder, tiles=2)


def test_older_releases_of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune_adapters.sa2va.adapter.transformers.__version__", "4.57.6")
    with pytest.raises(UnsupportedError, match=r"transformers 4\.57\.6 found, but Sa2VA needs 5\.0 or newer"):
        tp.load(folder)


def _drop(name: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        del state[name]

    return edit


def _set(name: str, *shape: int) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[name] = torch.zeros(*shape)

    return edit


def _without_sam(state: State) -> None:
    for name in [name for name in state if name.startswith(SAM)]:
        del state[name]


def _language(**changes: Any) -> dict[str, Any]:
    return {"config": {"llm_config": changes}}


def _trunk(**changes: Any) -> dict[str, Any]:
    return {"config": {"sam2_trunk": {**TRUNK, **changes}}}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "tower tensor missing": (
        {"edit": _drop(f"{TOWER}encoder.layers.1.attn.qkv.weight")},
        r"3 tensors are missing: vision_model\.encoder\.layers\.1\.attn\.qkv\.q\.weight",
    ),
    "decoder tensor missing": (
        {"edit": _drop(f"{LANGUAGE}model.norm.weight")},
        r"missing: language_model\.model\.norm",
    ),
    "embedding missing": ({"edit": _drop(f"{LANGUAGE}model.embed_tokens.weight")}, "embed_tokens.* is missing"),
    "SAM tensor missing": ({"edit": _drop(f"{SAM}no_mem_embed")}, r"missing: grounding_encoder\.sam2_model\.no_mem"),
    "point missing": ({"edit": _drop(f"{SAM}sam_prompt_encoder.point_embeddings.2.weight")}, r"with shape \[3, 32\]"),
    "no SAM": ({"edit": _without_sam}, "no Sa2VA checkpoint: no tensors are under grounding_encoder.sam2_model"),
    "unexpected": ({"edit": _set("mlp2.weight", 2)}, "1 tensor is unexpected: mlp2.weight"),
    "unmerged LoRA": ({"edit": _set("language_model.x.lora_A.weight", 2, 2)}, "unmerged LoRA tensors"),
    "misshaped": (
        {"edit": _set("mlp1.1.weight", 32, 60)},
        r"mlp1\.1\.weight with shape \[32, 60\], expected \[32, 64\]",
    ),
    "misshaped fused": (
        {"edit": _set(f"{TOWER}encoder.layers.0.attn.qkv.bias", 47)},
        r"attn\.qkv\.q\.bias with shape \[47\], expected \[16\]",
    ),
    "InternLM2": (
        _language(architectures=["InternLM2ForCausalLM"]),
        r"a decoder \['InternLM2For.*not those with Intern",
    ),
    "Phi-3": (_language(architectures=["Phi3ForCausalLM"]), r"with a decoder \['Phi3ForCausalLM'\]"),
    "Qwen-VL": (
        {"config": {"architectures": ["Sa2VAChatModelQwen"], "llm_config": None}},
        r"\['Sa2VAChatModelQwen'\] with no llm_config, expected \['Qwen2",
    ),
    "decoder size": (_language(hidden_size=None), "no hidden_size in its llm_config"),
    "decoder heads": (_language(num_attention_heads="many"), "describes no Qwen2 decoder"),
    "sliding windows": (_language(use_sliding_window=True), "says use_sliding_window"),
    "no tower": ({"config": {"vision_config": None}}, "no vision_config"),
    "tile": ({"config": {"force_image_size": 20}}, "tiles of 20 pixels and patches of 4"),
    "tower": ({"config": {"vision_config": {"num_attention_heads": 3}}}, "describes no InternVL tower"),
    "shuffle": ({"config": {"ps_version": "v1"}}, "says ps_version 'v1', expected 'v2'"),
    "ratio": ({"config": {"downsample_ratio": 0.25}}, "says downsample_ratio 0.25, expected 0.5"),
    "template": ({"config": {"template": "vicuna"}}, "says template 'vicuna', expected one of qwen_chat"),
    "layer": ({"config": {"select_layer": 4}}, "select_layer 4, but the tower has hidden states 0 … 3"),
    "heads": ({"config": {"sam_mask_decoder_heads": 5}}, "cannot have 5 heads"),
    "other trunk": ({"config": {"sam2_trunk": None}}, r"stages \[1, 1, 2, 1\] and width 8 found, expected Hiera-L's"),
    "trunk keys": (
        {"config": {"sam2_trunk": 7}},
        "sam2_trunk 7 found in config.json, expected an object with image_size",
    ),
    "trunk values": (_trunk(heads="two"), r"'heads': 'two'.* found in config.json, expected an object with image_size"),
    "trunk windows": (_trunk(windows=[4, 4, 2]), "4 stages, with 3 windows"),
    "trunk window": (_trunk(windows=[8, 4, 2, 2]), "the first window is of 4 patches, expected 8"),
    "trunk size": (_trunk(image_size=72), "pictures of 72 pixels found, expected a multiple of 32"),
    "trunk heads": (_trunk(heads=3), r"stages of widths \[8, 16, 32, 64\] cannot have"),
    "tokens": (
        {"added": tuple(token for token in ADDED if token != "[SEG]")},
        r"lacks \[SEG\]; use the tokenizer files",
    ),
    "too many tokens": ({"added": (*ADDED, "<more>")}, "has 266 ids, but the embedding table has 265 rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit(tmp_path: Path, name: str) -> None:
    options, message = BROKEN[name]
    with pytest.raises(CheckpointError, match=message) as found:
        tp.load(write_sa2va(tmp_path, **options))
    assert "\n" not in str(found.value)


def test_a_vocabulary_and_merges_do_too(tmp_path: Path, model: Sa2vaModel) -> None:
    """Older releases of transformers wrote these, and the ids of added tokens in tokenizer_config.json."""
    write_sa2va(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(BYTES)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    kind = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(len(BYTES) + number): {"content": token, **kind} for number, token in enumerate(ADDED)}
    about = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**about, "added_tokens_decoder": decoder}))
    found = tp.load(tmp_path).tokenizer
    text = "<|im_start|>user\n<img></img>\n Please segment the café.<|im_end|>\n Sure, [SEG]."
    assert found.encode(text) == model.tokenizer.encode(text)
    assert (found.eos_id, found.pad_id, found.token_id("[SEG]")) == (256, 257, SEG_ID)
    assert found.decode(found.encode(text)) == text.replace("<|im_end|>", "")
    assert found.pieces(found.encode("a[SEG]")) == ["a", "[SEG]"]


def test_tokenizer_files(tmp_path: Path) -> None:
    write_sa2va(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be read"):
        tp.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, nor vocab\.json with merges\.txt"):
        tp.load(tmp_path)


def test_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    lisa = write_lisa(tmp_path, config={"architectures": ["Sa2VAChatModel"]})
    with pytest.raises(CheckpointError, match="no Sa2VA checkpoint: no tensors are under grounding_encoder"):
        tp.load(lisa)
