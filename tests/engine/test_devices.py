"""Decoders spread over devices, offloaded, or quantised: a pruned run is what it is on one device in full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pretend_devices import PretendDevices, pretend
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import tokenprune as tp
from tokenprune.core.decisions import Decision, Merge
from tokenprune.core.reads import AttentionFrom, Embeddings, HiddenStates
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS = 8
DELTA = {"reentry": "delta"}  # reads hidden states and writes them
STRATEGIES = ["none", "blind", "random", "uniform", "fastv", "csp"]
IN_DECODER: dict[str, dict[str, Any]] = {
    "pyramiddrop": {},
    "sparsevlm": {},
    "sparsevlm+": {},
    "dart": {"keep": 6},
    "tome": {},
    "similarity": {},
}
IMAGE = torch.zeros(2, 24, dtype=torch.bool)
IMAGE[:, 4:20] = True
IDS = torch.arange(48).reshape(2, 24) % 60 + 1


class Pooled(Strategy):
    """All image tokens become one in layer 5, of a value that depends on their states then and at the start."""

    name = "pooled"

    def stages(self, shape: Shape) -> Iterator[Stage]:
        yield Stage("pool", 5, 1, (HiddenStates(), Embeddings(), AttentionFrom("last")))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        weights = tokens.attention.softmax(1)[:, None]
        best = tokens.attention.argmax(1)[:, None]
        return Merge(best, weights=weights, values=weights @ (tokens.hidden + tokens.embeddings))


def offloaded(folder: Path, places: list[str]) -> LlamaForCausalLM:
    model = tiny_llama(LAYERS, kv_heads=2)
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    layers = {f"model.layers.{i}": place for i, place in enumerate(places)}
    accelerate.dispatch_model(model, {**ends, **layers}, main_device="cpu", offload_dir=str(folder))
    return model


def outputs(model: nn.Module, strategy: tp.Strategy) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Logits of a prefill, tokens generated with a cache, and the scores of each stage."""
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=IMAGE) as run:
        logits = model(IDS).logits
        scores = [stage.scores for stage in run.trace.stages]
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, tokens, scores


@pytest.mark.parametrize("places", [["cpu", "disk"] * 4, ["disk"] * LAYERS], ids=["mixed", "disk"])
@pytest.mark.parametrize("name", [*STRATEGIES, *IN_DECODER])
def test_offloaded_layers_give_the_same(tmp_path: Path, name: str, places: list[str]) -> None:
    model = offloaded(tmp_path, places)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta  # between calls the weights are away
    with torch.no_grad():
        before = model(IDS).logits
    strategy = tp.strategy(name, **IN_DECODER.get(name, {}))
    found = outputs(model, strategy)
    expected = outputs(tiny_llama(LAYERS, kv_heads=2), strategy)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found[2], expected[2], strict=True):
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_an_exception_leaves_accelerates_hooks_alone(tmp_path: Path) -> None:
    model = offloaded(tmp_path, ["cpu", "disk"] * 4)
    hooks = [layer._hf_hook for layer in model.model.layers]
    with torch.no_grad():
        before = model(IDS).logits
        fails = model.model.layers[5].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), tp.prune(model, tp.strategy("fastv"), image_tokens=IMAGE):
            model(IDS)
        fails.remove()
        assert torch.equal(model(IDS).logits, before)
    assert [layer._hf_hook for layer in model.model.layers] == hooks


def test_weights_kept_on_the_cpu_and_brought_per_layer() -> None:
    model = tiny_llama(LAYERS, kv_heads=2)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    found, expected = (outputs(m, tp.strategy("csp")) for m in (model, tiny_llama(LAYERS, kv_heads=2)))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def spread(model: LlamaForCausalLM, first: int) -> LlamaForCausalLM:
    """The first layers on one pretended device, the others on a second; hooks of accelerate move what goes between."""

    def place(module: nn.Module, device: str) -> None:
        pretend(module, device)
        add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(device)))

    for module in (model.model.embed_tokens, model.model.rotary_emb, model.lm_head):
        place(module, "cuda:0")
    place(model.model.norm, "cuda:1")
    for number, layer in enumerate(model.model.layers):
        place(layer, "cuda:0" if number < first else "cuda:1")
    return model


@pytest.fixture
def pretending() -> Iterator[None]:
    with PretendDevices():
        yield


@pytest.mark.parametrize(("first", "padded"), [(1, True), (4, False)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in STRATEGIES),
        *IN_DECODER.items(),
        ("csp", DELTA),
        ("pooled", {}),
        ("renumber", {}),
    ],
)
def test_layers_on_two_devices(pretending: None, name: str, options: dict[str, Any], padded: bool, first: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("pretended CUDA devices would get in the way of the real ones of this machine")
    if name in ("pooled", "renumber"):
        strategy: tp.Strategy = Pooled()
        strategy.positions = "renumber" if name == "renumber" else "keep"
    else:
        strategy = tp.strategy(name, **options)
    valid = torch.ones_like(IDS)
    if padded:
        valid[1, 22:] = 0
    given: dict[str, Any] = {"use_cache": False}
    plain = tiny_llama(LAYERS, kv_heads=2, attention="eager")
    with torch.no_grad(), tp.prune(plain, strategy, image_tokens=IMAGE):
        expected = plain(IDS, attention_mask=valid, **given).logits
    model = spread(tiny_llama(LAYERS, kv_heads=2, attention="eager"), first)
    marks = IMAGE  # as a user would give them: on the CPU
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks) as run:
        logits = model(IDS.to("cuda:0"), attention_mask=valid.to("cuda:0"), **given).logits
    assert str(logits.device) == "cuda:0"
    assert (logits.cpu() - expected)[valid.bool()].abs().max() < 1e-5
    assert len(run.trace.ledger.entries) == LAYERS


def test_pretended_devices_do_not_mix(pretending: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("pretended CUDA devices would get in the way of the real ones of this machine")
    one = torch.ones(3).to("cuda:0")
    assert (one + 1).device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        one + one.to("cuda:1")
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        one * torch.arange(3)


class Int8Linear(nn.Module):
    """A linear layer of int8 weights with a scale per output, as quantisation libraries put in place of `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states: Tensor) -> Tensor:
        return states @ (self.weight.to(states.dtype) * self.scale.to(states.dtype)).T


def quantised(kind: str) -> LlamaForCausalLM:
    model = tiny_llama(LAYERS, kv_heads=2)
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, Int8Linear(linear))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["int8", "dynamic"])
@pytest.mark.parametrize("name", ["none", "fastv", "csp"])
def test_quantised_layers(name: str, kind: str) -> None:
    model = quantised(kind)
    with torch.no_grad():
        plain = model(IDS).logits
    logits, tokens, scores = outputs(model, tp.strategy(name))
    exact = outputs(tiny_llama(LAYERS, kv_heads=2), tp.strategy(name))
    assert tokens.shape == (2, 28)
    if name == "none":
        assert torch.equal(logits, plain)
    for one, other in zip(scores, exact[2], strict=True):
        if one is not None and other is not None and one.isfinite().any():
            seen = one.isfinite() & other.isfinite()
            assert one.dtype == torch.float32
            assert (one - other)[seen].abs().max() < 0.1
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain)


@pytest.mark.gpu
def test_flash_attention_equals_sdpa() -> None:
    """Needs the package flash-attn as well; ragged rows make the engine hand 2-D masks to it."""
    pytest.importorskip("flash_attn", reason="the package flash-attn is not installed here")
    valid = torch.ones_like(IDS)
    valid[1, 20:] = 0
    results = []
    for attention in ("flash_attention_2", "sdpa"):
        model = tiny_llama(LAYERS, kv_heads=2, attention=attention).to("cuda", torch.bfloat16)
        with torch.no_grad(), tp.prune(model, tp.strategy("fastv"), image_tokens=IMAGE) as run:
            logits = model(IDS.cuda(), attention_mask=valid.cuda()).logits
        results.append((logits.float().cpu(), run.trace.stages[0].scores))
    (flash, flash_scores), (sdpa, sdpa_scores) = results
    assert flash_scores is not None
    assert sdpa_scores is not None
    seen = sdpa_scores.isfinite()
    assert (flash_scores - sdpa_scores)[seen].abs().max() < 0.05
    assert torch.isfinite(flash[valid.bool()]).all()
    assert (flash - sdpa)[valid.bool()].abs().mean() < 0.2
