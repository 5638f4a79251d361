"""What loading a checkpoint of any segmentation family has in common: file formats, options, where the tower is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa, write_tower
from pixellm_checkpoints import write_pixellm, write_pixellm_tower

import tokenprune as tp
from tokenprune.errors import OptionError
from tokenprune.loading.adapter import Adapter
from tokenprune_adapters.glamm import GlammAdapter
from tokenprune_adapters.lisa import LisaAdapter
from tokenprune_adapters.pixellm import PixelLMAdapter


class Family(NamedTuple):
    """How to write a family's tiny checkpoint, with a tower or without, and its tower alone."""

    adapter: type[Adapter]
    write: Callable[..., Path]
    bare: dict[str, bool]
    write_tower: Callable[[Path], Path]


class Loaded(NamedTuple):
    """One checkpoint, and its model."""

    family: Family
    folder: Path
    model: Any

    def mask(self, model: Any, strategy: tp.Strategy | None = None) -> torch.Tensor:
        image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
        found: torch.Tensor = model.segment(image, ["the cat", "a dog"], strategy).mask_logits
        return found


FAMILIES = {
    "lisa": Family(LisaAdapter, write_lisa, {"tower": False}, write_tower),
    "glamm": Family(GlammAdapter, write_glamm, {"tower": False}, write_tower),
    "pixellm": Family(PixelLMAdapter, write_pixellm, {"with_tower": False}, write_pixellm_tower),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    family = FAMILIES[request.param]
    folder = family.write(tmp_path_factory.mktemp(request.param) / "tiny")
    return Loaded(family, folder, tp.load(folder))


def same_weights(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    tensors = wanted.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize(
    ("files", "shards"),
    [("pytorch_model.bin", 1), ("pytorch_model.bin", 3), ("model.safetensors", 2)],
    ids=["bin", "sharded-bin", "sharded-safetensors"],
)
def test_all_file_formats_load_alike(loaded: Loaded, tmp_path: Path, files: str, shards: int) -> None:
    folder = loaded.family.write(tmp_path, files=files, shards=shards)
    assert same_weights(loaded.family.adapter.load(str(folder)), loaded.model)


def test_a_loaded_model_is_ready(loaded: Loaded) -> None:
    tensors = [*loaded.model.named_parameters(), *loaded.model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.is_meta] == []
    assert not loaded.model.training
    assert loaded.model.name == "tiny"


def test_weights_are_bfloat16_where_asked_for(loaded: Loaded) -> None:
    model = tp.load(loaded.folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.decoder.model.rotary_emb.inv_freq.dtype == torch.float32
    for strategy in (None, tp.strategy("fastv", budget=0.6)):
        logits = loaded.mask(model, strategy)
        assert logits.dtype == torch.float32
        assert bool(logits.isfinite().all())


def test_the_decoder_may_be_spread(loaded: Loaded) -> None:
    spread = tp.load(loaded.folder, device_map="auto", dtype="float32")
    assert torch.allclose(loaded.mask(spread), loaded.mask(loaded.model), atol=1e-5)


def test_eager_attention_gives_the_same(loaded: Loaded) -> None:
    eager = tp.load(loaded.folder, attn_implementation="eager")
    assert {eager.decoder.config._attn_implementation, eager.tower.config._attn_implementation} == {"eager"}
    assert torch.allclose(loaded.mask(eager), loaded.mask(loaded.model), atol=1e-4)


def test_the_tower_is_found_where_it_is_given(loaded: Loaded, tmp_path: Path) -> None:
    family, tower = loaded.family, loaded.family.write_tower(tmp_path / "tower")
    bare = family.write(tmp_path / "bare", **family.bare)
    named = family.write(tmp_path / "named", **family.bare, config={"mm_vision_tower": str(tower)})
    for model in (tp.load(bare, vision_tower=tower), tp.load(named)):
        assert same_weights(model.tower, loaded.model.tower)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtyp": "float32"}, "models have no load option 'dtyp'; did you mean 'dtype'"),
        ({"dtype": "int8"}, "expected one of float32, bfloat16, float16"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": "cpu", "device_map": "auto"}, "both device= and device_map="),
    ],
    ids=["unknown", "dtype", "device", "two places"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_bad_options_are_told_before_the_checkpoint_is_looked_at(
    name: str, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        FAMILIES[name].adapter.load(str(tmp_path / "no such folder"), **options)
