"""Folders with an unmerged LoRA adapter: weights are W + scale · B · A, by hand and by peft, or refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_segmentation import FakeAdapter
from glamm_checkpoints import write_glamm
from lisa_checkpoints import State, write_lisa
from pixellm_checkpoints import write_pixellm
from safetensors.torch import load_file, save_file
from torch import Tensor
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune import hookimpl
from tokenprune.errors import CheckpointError, UnsupportedError
from tokenprune.plugins import registry

RANK, ALPHA = 3, 8
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"  # [32, 32]
UP = "model.layers.2.mlp.up_proj"  # [48, 32]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"}
WRITERS = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(module: str, outputs: int, inputs: int, rank: int = RANK) -> State:
    names = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
    return dict(zip(names, (drawn(rank, inputs, seed=4), drawn(outputs, rank, seed=5)), strict=True))


ADAPTER: State = {**factors(QUERY, 32, 32), **factors(UP, 48, 32)}


def write_adapter(
    folder: Path, base: object = None, tensors: State | None = None, file: str = "safetensors", **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = None if base is None else str(base)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": name, **config}))
    tensors = ADAPTER if tensors is None else tensors
    if file == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


def weights(model: Any) -> State:
    return dict(model.state_dict())


def merged_by_hand(before: Tensor, tensors: State, module: str, scale: float) -> Tensor:
    left, right = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "BA")
    return before.double() + scale * left @ right


def assert_merged(base: Any, found: Any, scales: dict[str, float], tensors: State = ADAPTER) -> None:
    """Every tensor of the models is the same, but for those of `scales`, which are merged."""
    before, after = weights(base), weights(found)
    assert before.keys() == after.keys()
    changed = {f"decoder.{module}.weight": (module, scale) for module, scale in scales.items()}
    for name, tensor in after.items():
        if name in changed:
            wanted = merged_by_hand(before[name], tensors, *changed[name])
            assert (wanted - before[name]).abs().max() > 0.5
            assert torch.allclose(tensor.double(), wanted, rtol=1e-5, atol=1e-5), name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lisa(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def whole(base: Path) -> Any:
    return tp.load(base)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_an_adapter_beside_its_base_is_merged(tmp_path: Path, name: str, file: str) -> None:
    base = WRITERS[name](tmp_path / "base")
    found = tp.load(write_adapter(tmp_path / "adapter", base, file=file))
    assert_merged(tp.load(base), found, dict.fromkeys((QUERY, UP), ALPHA / RANK))
    assert found.name == "adapter"


def test_places_of_the_base(base: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = dict.fromkeys((QUERY, UP), ALPHA / RANK)
    monkeypatch.chdir(base.parent)
    assert_merged(whole, tp.load(write_adapter(tmp_path / "1", base.name)), scales)
    shutil.copytree(base, tmp_path / "2" / "inside")
    assert_merged(whole, tp.load(write_adapter(tmp_path / "2", "inside")), scales)
    for number, named in (("3", None), ("4", "."), ("5", tmp_path / "5")):  # weights and adapter in one folder
        monkeypatch.chdir(tmp_path)
        shutil.copytree(base, tmp_path / number)
        if named == ".":
            monkeypatch.chdir(tmp_path / number)
        assert_merged(whole, tp.load(write_adapter(tmp_path / number, named)), scales)


def test_files_beside_the_adapter_come_first(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_select_layer": -1}))
    shutil.copy(base / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<im_start>": 640, "<im_end>": 641, "[SEG]": 642}))
    model = tp.load(folder)
    assert model.select_layer == -1
    assert model.tokenizer.token_id("[SEG]") == 642


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"use_rslora": True}, (ALPHA / RANK**0.5, ALPHA / RANK**0.5)),
        ({"alpha_pattern": {"q_proj": 5}}, (5 / RANK, ALPHA / RANK)),
        ({"alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 2, "proj": 99}}, (ALPHA / RANK, 2 / RANK)),
        ({"alpha_pattern": {QUERY: 5}, "use_rslora": True}, (5 / RANK**0.5, ALPHA / RANK**0.5)),
        ({"r": 7, "rank_pattern": {"q_proj": 3, "up_proj": 3}}, (ALPHA / 3, ALPHA / 3)),
        (
            {"init_lora_weights": "gaussian", "target_modules": ["q_proj", "up_proj"], "revision": "main"},
            (ALPHA / RANK,) * 2,
        ),
    ],
)
def test_scales(base: Path, whole: Any, tmp_path: Path, config: dict[str, Any], scales: tuple[float, float]) -> None:
    found = tp.load(write_adapter(tmp_path, base, **config))
    assert_merged(whole, found, dict(zip((QUERY, UP), scales, strict=True)))


def test_whole_tensors_replace_those_of_the_base(base: Path, whole: Any, tmp_path: Path) -> None:
    """Trained biases, modules_to_save, and what LLaVA's training code writes beside the adapter."""
    head, bias, seg = drawn(643, 32), drawn(32, seed=6), drawn(32, 32, seed=7)
    tensors = {
        **factors(QUERY, 32, 32),
        **factors("model.mm_projector", 32, 16),
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}model.mm_projector.base_layer.bias": bias,
    }
    folder = write_adapter(tmp_path, base, tensors, bias="all", modules_to_save=["lm_head"])
    torch.save({f"{PREFIX}model.text_hidden_fcs.0.2.weight": seg}, folder / "non_lora_trainables.bin")
    found = tp.load(folder)
    assert torch.equal(found.decoder.lm_head.weight, head)
    assert torch.equal(found.projector.bias, bias)
    assert torch.equal(found.mask_projection[2].weight, seg)
    wanted = merged_by_hand(whole.projector.weight, tensors, "model.mm_projector", ALPHA / RANK)
    assert torch.allclose(found.projector.weight.double(), wanted, atol=1e-5)


def test_half_precision_is_rounded_once(base: Path, whole: Any, tmp_path: Path) -> None:
    before = whole.decoder.get_parameter(f"{QUERY}.weight").data
    half = write_lisa(tmp_path / "half", edit=lambda state: state.update({k: v.half() for k, v in state.items()}))
    found = tp.load(write_adapter(tmp_path / "adapter", half), dtype="float16").decoder.get_parameter(f"{QUERY}.weight")
    wanted = merged_by_hand(before.half(), ADAPTER, QUERY, ALPHA / RANK)
    assert found.dtype == torch.float16
    assert torch.allclose(found.double(), wanted, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 5},
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 3}},
        {"target_modules": ["k_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["k_proj"], "layers_to_transform": [1], "bias": "lora_only"},
    ],
)
def test_equal_to_peft(base: Path, whole: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; merging by hand is tested without it")
    decoder = tp.load(base).decoder
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(decoder, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    wanted, found = weights(wrapped.merge_and_unload()), weights(tp.load(tmp_path).decoder)
    assert wanted.keys() == found.keys()
    assert any(not torch.equal(tensor, found[name]) for name, tensor in weights(whole.decoder).items())
    for name, tensor in found.items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-5, atol=1e-5), name


def without(name: str) -> State:
    return {key: tensor for key, tensor in ADAPTER.items() if key != PREFIX + name}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (None, {"peft_type": "IA3"}, "an adapter of type 'IA3', expected LORA; merge it with peft"),
        (None, {"use_dora": True}, "has use_dora=True, which is not supported; merge it with peft"),
        (None, {"lora_bias": True}, "has lora_bias=True, which is not supported"),
        (None, {"fan_in_fan_out": True}, "has fan_in_fan_out=True, which is not supported"),
        (None, {"layer_replication": [[0, 2]]}, r"has layer_replication=\[\[0, 2\]\], which is not supported"),
        (None, {"trainable_token_indices": [3]}, "has trainable_token_indices"),
        (None, {"some_later_setting": 1}, "has some_later_setting=1, which is not supported"),
        (None, {"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4', which is not"),
        (None, {"revision": "abc"}, "has revision='abc', which is not supported"),
        (None, {"lora_alpha": None}, "lora_alpha is None, expected a number above 0"),
        (None, {"alpha_pattern": {"*": 2}}, r"alpha_pattern has '\*': 2, expected a regular expression and a number"),
        (None, {"rank_pattern": {"q_proj": "3"}}, "rank_pattern has 'q_proj': '3', expected a regular"),
        (factors("model.vision_tower.q_proj", 4, 4), {}, r"changes the vision tower \(model.vision_tower.q_proj\)"),
        (None, {"r": 5}, f"says rank 5 for {QUERY}, whose factors are"),
        (without(f"{UP}.lora_B.weight"), {}, f"has only the factor A of {UP}"),
        ({}, {}, "contains no LoRA factors"),
        (
            factors("model.layers.9.self_attn.q_proj", 32, 32),
            {},
            "changes model.layers.9.self_attn.q_proj, which the base",
        ),
        (factors(QUERY, 32, 30), {}, rf"changes {QUERY} by \[32, 30\], which is \[32, 32\] in the base"),
        ({**ADAPTER, f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(48)}, {}, "lora_magnitude_vector, which is not"),
        ({**ADAPTER, f"{PREFIX}model.spare.weight": torch.ones(4)}, {}, "unexpected: model.spare.weight"),
    ],
)
def test_what_is_not_covered_is_refused(
    base: Path, tmp_path: Path, tensors: State | None, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        tp.load(write_adapter(tmp_path, base, tensors, **config))
    assert "\n" not in str(caught.value)


def offline(*args: Any, **options: Any) -> str:
    raise ConnectionError("no network")


def test_a_base_that_is_not_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name in ("nobody/no-base", "/nowhere/base"):
        with pytest.raises(CheckpointError, match=f"unmerged adapter of '{name}', which is not there; put the base"):
            tp.load(write_adapter(tmp_path / "1", name))
    shutil.copytree(base, tmp_path / "2")  # whether these weights are the base or merged already, nothing tells
    with pytest.raises(CheckpointError, match=r"base model '/nowhere/base': .*correct base_model_name_or_path"):
        tp.load(write_adapter(tmp_path / "2", "/nowhere/base"))
    with pytest.raises(CheckpointError, match="holds an unmerged adapter and names no base model; put"):
        tp.load(write_adapter(tmp_path / "3"))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read as JSON"):
        tp.load(tmp_path / "4")
    (write_adapter(tmp_path / "5", base) / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither of adapter_model\.safetensors, adapter_model\.bin"):
        tp.load(tmp_path / "5")


def test_an_adapter_on_the_hub_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fetch(source: str, name: str) -> str:
        if name != "adapter_config.json":
            raise FileNotFoundError(name)
        return name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(
        CheckpointError, match=r"somebody/adapter is an unmerged adapter without a config.json; fetch it"
    ):
        tp.load("somebody/adapter")


def test_lora_tensors_among_the_weights(tmp_path: Path) -> None:
    def wrap(state: State) -> None:
        for name in list(state):
            state[PREFIX + name.replace("q_proj.", "q_proj.base_layer.")] = state.pop(name)
        state[f"{PREFIX}{QUERY}.lora_A.default.weight"] = drawn(3, 32)
        state[f"{PREFIX}{QUERY}.lora_B.default.weight"] = drawn(32, 3)

    def rename(prefix: str) -> Callable[[State], None]:
        return lambda state: state.update({prefix + name: state.pop(name) for name in list(state)})

    with pytest.raises(CheckpointError, match=r"2, such as .*lora_A.default.weight.*whose scale is not stored"):
        tp.load(write_lisa(tmp_path / "1", edit=wrap))
    with pytest.raises(CheckpointError, match="was saved with peft around the model"):
        tp.load(write_lisa(tmp_path / "2", edit=rename(PREFIX)))
    with pytest.raises(CheckpointError, match="was saved with a data-parallel wrapper around the model"):
        tp.load(write_lisa(tmp_path / "3", edit=rename("module.")))


def test_an_adapter_of_a_family_that_merges_none_is_refused(tmp_path: Path) -> None:
    class Plugin:
        @hookimpl
        def tokenprune_register_adapters(self, register: Any) -> None:
            register("fake-adapter", FakeAdapter)

    registry.register_plugin(Plugin(), "fake")
    try:
        (write_adapter(tmp_path, tmp_path) / "config.json").write_text('{"architectures": ["Fake"]}')
        with pytest.raises(CheckpointError, match="which 'fake-adapter' does not merge; merge it with peft"):
            tp.load(tmp_path)
    finally:
        registry.unregister_plugin("fake")


# transformers' own models --------------------------------------------------------------------------------------------

LLAVA = "model.language_model.layers.1.self_attn.v_proj"
needs_tiny_processors = pytest.mark.skipif(
    not CURRENT, reason="the tiny processors are those of transformers 5.20 and later"
)


@needs_tiny_processors
def test_peft_merges_into_transformers_models(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed, which merges adapters of transformers' own models")
    base = write_vlm(tmp_path / "base", "llava")
    before = tp.load(base).model.state_dict()
    shape = before[f"{LLAVA}.weight"].shape
    tensors = factors(LLAVA, *shape)
    config = {"target_modules": f".*{LLAVA}"}
    model = tp.load(write_adapter(tmp_path / "adapter", base, tensors, **config))
    for name, tensor in model.model.state_dict().items():
        wanted = before[name].double()
        if name == f"{LLAVA}.weight":
            wanted = merged_by_hand(wanted, tensors, LLAVA, ALPHA / RANK)
            assert (wanted - before[name]).abs().max() > 0.5
        assert torch.allclose(tensor.double(), wanted, atol=1e-5), name
    assert model.name == "adapter"
    assert model.answer(torch.zeros(3, 20, 20), "What?", tp.strategy("fastv", budget=0.6)).trace is not None
    other = {f"{PREFIX}{LLAVA}.lora_A.weight": tensors[f"{PREFIX}{LLAVA}.lora_A.weight"]}
    with pytest.raises(CheckpointError, match=r"is for another model: 1 tensors do not match, such as .*lora_B"):
        tp.load(write_adapter(tmp_path / "other", base, other, **config))
    spare = {**tensors, **factors("model.elsewhere.v_proj", *shape)}
    with pytest.raises(CheckpointError, match=r"is for another model: 2 tensors do not match, such as .*elsewhere"):
        tp.load(write_adapter(tmp_path / "spare", base, spare, **config))
    shutil.copytree(base, tmp_path / "both")
    with pytest.raises(CheckpointError, match="names no other base model; move the adapter to a separate folder"):
        tp.load(write_adapter(tmp_path / "both", None, tensors, **config))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        tp.load(write_adapter(tmp_path / "wide", base, factors(LLAVA, 7, 7), **config))


@needs_tiny_processors
def test_transformers_models_without_peft_or_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_vlm(tmp_path / "base", "llava")
    monkeypatch.setitem(sys.modules, "peft", None)
    for named in (base, None):
        folder = tmp_path / f"adapter-{named is None}"
        if named is None:
            shutil.copytree(base, folder)
        with pytest.raises(UnsupportedError, match="requires the package peft; install it"):
            tp.load(write_adapter(folder, named, factors(LLAVA, 32, 32)))


@needs_tiny_processors
def test_lora_tensors_among_transformers_weights(tmp_path: Path) -> None:
    path = write_vlm(tmp_path, "llava") / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("layers.1.self_attn.v_proj.weight"))
    state[name.replace("weight", "lora_A.default.weight")] = drawn(3, 32)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="contains unmerged LoRA tensors among its weights"):
        tp.load(tmp_path)
