"""Loading LISA checkpoints of unusual sizes onto transformers' classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from lisa_checkpoints import CHANNELS, CONFIG, State, state_dict, tower_model, write_lisa
from transformers import CLIPConfig, CLIPModel, SamConfig, SamModel, SamVisionConfig

import tokenprune as tp
from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint
from tokenprune_adapters.lisa import LisaAdapter, LisaModel
from tokenprune_adapters.segmentation.sam.weights import build_sam, original_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lisa(tmp_path_factory.mktemp("lisa") / "tiny-lisa")


@pytest.fixture(scope="module")
def model(folder: Path) -> LisaModel:
    loaded: LisaModel = tp.load(folder)
    return loaded


def test_sizes_come_from_the_weights(model: LisaModel) -> None:
    vision = model.sam.config.vision_config
    assert (vision.image_size, vision.patch_size, vision.window_size, vision.hidden_size) == (64, 8, 3, 24)
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.mlp_dim) == (3, 3, 40)
    assert list(vision.global_attn_indexes) == [1]
    assert (vision.output_channels, vision.num_pos_feats, vision.layer_norm_eps) == (CHANNELS, CHANNELS // 2, 1e-6)
    decoder = model.sam.config.mask_decoder_config
    assert (decoder.hidden_size, decoder.mlp_dim, decoder.num_hidden_layers) == (CHANNELS, 56, 1)
    assert (decoder.num_multimask_outputs, decoder.iou_head_depth, decoder.iou_head_hidden_dim) == (2, 4, 20)
    assert (decoder.num_attention_heads, decoder.attention_downsample_rate) == (4, 2)
    assert model.sam.config.prompt_encoder_config.mask_input_channels == 8
    assert model.decoder.config.num_key_value_heads == 2
    assert model.name == "tiny-lisa"


def test_layer_norm_epsilons(model: LisaModel) -> None:
    block = model.sam.mask_decoder.transformer.layers[0]
    assert {norm.eps for norm in (block.layer_norm1, block.layer_norm2, block.layer_norm3, block.layer_norm4)} == {1e-5}
    assert model.sam.mask_decoder.transformer.layer_norm_final_attn.eps == 1e-5
    assert model.sam.mask_decoder.upscale_layer_norm.eps == 1e-6
    assert model.sam.vision_encoder.layers[0].layer_norm1.eps == 1e-6
    assert model.sam.vision_encoder.neck.layer_norm1.eps == 1e-6
    assert model.sam.prompt_encoder.mask_embed.layer_norm1.eps == 1e-6


def test_every_tensor_arrives_under_its_name(model: LisaModel) -> None:
    parts = {
        "": model.decoder,
        "model.mm_projector.": model.projector,
        "model.text_hidden_fcs.0.": model.mask_projection,
    }
    found = {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}
    for name, tensor in model.sam.state_dict().items():
        found["model.visual_model." + original_name(name, 4)] = tensor
    wanted = {name: tensor for name, tensor in state_dict().items() if not name.endswith("inv_freq")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    shared = model.sam.shared_image_embedding.positional_embedding
    assert torch.equal(shared, model.sam.prompt_encoder.shared_embedding.positional_embedding)


def test_nothing_is_left_on_the_meta_device_and_rotary_tables_are_computed(model: LisaModel) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.is_meta] == []
    head_size = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    wanted = 10000.0 ** -(torch.arange(0, head_size, 2) / head_size)
    assert torch.allclose(model.decoder.model.rotary_emb.inv_freq, wanted)
    assert not model.training


def test_old_bin_format_loads(tmp_path: Path, model: LisaModel) -> None:
    write_lisa(tmp_path, files="pytorch_model.bin")
    torch.save(state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(tp.load(tmp_path).projector.weight, model.projector.weight)


def test_weights_never_run_code(tmp_path: Path) -> None:
    write_lisa(tmp_path, files="pytorch_model.bin")
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="damaged"):
        tp.load(tmp_path)


def test_tied_embeddings(tmp_path: Path) -> None:
    def drop_head(state: State) -> None:
        del state["lm_head.weight"]

    loaded = tp.load(write_lisa(tmp_path, config={"tie_word_embeddings": True}, edit=drop_head))
    assert loaded.decoder.lm_head.weight is loaded.decoder.model.embed_tokens.weight


def test_sam_without_windows(tmp_path: Path) -> None:
    def global_everywhere(state: State) -> None:
        for name in state:
            if ".rel_pos_" in name:
                state[name] = torch.zeros(15, 8)

    vision = tp.load(write_lisa(tmp_path, edit=global_everywhere)).sam.config.vision_config
    assert list(vision.global_attn_indexes) == [0, 1, 2]


def test_a_whole_clip_model_serves_as_tower(tmp_path: Path) -> None:
    vision = tower_model().config
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    bare = write_lisa(tmp_path / "bare", tower=False)
    tower = tp.load(bare, vision_tower=tmp_path / "clip").tower
    wanted = clip.vision_model.state_dict()
    found = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_matches_by_architecture() -> None:
    assert LisaAdapter.matches("x", {"architectures": ["LISAForCausalLM"]})
    assert LisaAdapter.matches("x", {"architectures": ["LisaGSVAForCausalLM"]})
    assert not LisaAdapter.matches("x", {"architectures": ["GLaMMForCausalLM"]})
    assert not LisaAdapter.matches("x", {})


def test_gsvas_rejections_give_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GSVA is LISA with a token [REJ] for what is not in the image, which its answers hold beside [SEG]."""
    added = {"[SEG]": 640, "[REJ]": 641, "<im_start>": 642, "<im_end>": 643}

    def longer(state: State) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            row = torch.randn(1, state[name].shape[1], generator=torch.Generator().manual_seed(2)) * 0.2
            state[name] = torch.cat([state[name], row])

    about = {"architectures": ["LisaGSVAForCausalLM"], "vocab_size": 644}
    model = tp.load(write_lisa(tmp_path, config=about, added=added, edit=longer))
    assert model.tokenizer.token_id("[REJ]") == 641
    image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    question = "What are the cat, the dog and the cup in this image? Please output segmentation mask."
    prompt = f"USER: <im_start><image><im_end>\n {question} ASSISTANT: the cat:[SEG], the dog:[REJ], the cup:[SEG].</s>"
    both = model.segment(image, prompt=prompt, strategy=tp.strategy("fastv", layer=1, keep=0.5))
    assert both.masks.shape == (2, 40, 50)
    alone = model.segment(image, prompt=prompt.split(", the cup")[0] + ".</s>")
    first = model.segment(image, prompt=prompt).low_res_logits[0]
    assert torch.allclose(alone.low_res_logits[0], first, atol=1e-5)  # later words are not seen
    always = torch.nn.functional.one_hot(torch.tensor(641), 644).float()
    monkeypatch.setattr(model.decoder.lm_head, "forward", lambda states: always.expand(*states.shape[:-1], -1))
    said = model.segment(image, "the dog", answer="generate", max_new_tokens=2)
    assert said.text == "[REJ] [REJ]"
    assert said.masks.shape == (0, 40, 50)


def test_mask_decoder_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention of width 16, cannot have 7 heads"):
        tp.load(write_lisa(tmp_path, config={"sam_mask_decoder_heads": 7}))


def test_released_decoder_heads_are_the_default(tmp_path: Path) -> None:
    loaded = tp.load(write_lisa(tmp_path, config={"sam_mask_decoder_heads": None}))
    assert loaded.sam.config.mask_decoder_config.num_attention_heads == 8


class Shapes:
    """A checkpoint of which only the shapes are known."""

    folder = Path("released")

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str, dims: int | None = None) -> tuple[int, ...]:
        return self.shapes[name]


def test_the_released_sam_is_recognised() -> None:
    vision = SamVisionConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
        mlp_dim=5120,
    )
    released = SamConfig(vision_config=vision.to_dict(), mask_decoder_config={"layer_norm_eps": 1e-5})
    with torch.device("meta"):
        sam = SamModel(released)
    shapes = {"sam." + original_name(name): tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    part = build_sam(cast(Checkpoint, Shapes(shapes)), "sam.")
    for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        wanted, found = getattr(released, name).to_dict(), getattr(part.module.config, name).to_dict()
        assert {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} == {
            key: list(v) if isinstance(v, tuple) else v for key, v in wanted.items()
        }
    assert set(part.names.values()) == set(shapes)


def test_golden_config_has_no_surprises(golden: Callable[[str], Path]) -> None:
    config = json.loads((golden("lisa") / "checkpoint" / "config.json").read_text())
    assert LisaAdapter.matches("x", config)
