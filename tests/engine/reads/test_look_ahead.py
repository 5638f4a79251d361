"""Attention ahead of a layer: what is computed, on which decoders, and when the layer takes its keys from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from model_state import state
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.ledger import LookAhead
from tokenprune.core.reads import AttentionFrom, HiddenStates, LayerKeys
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.cost import DecoderSpec, count_flops, flop_counter
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH, LENGTH = 4, 32, 20
AHEAD, BACK = AttentionFrom("raters", "each", "each", layer="next"), AttentionFrom("raters", "each", "each")
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VQ = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 8, "num_embeddings": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": LAYERS,
}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},  # norms of queries and keys, heads wider than the states
    "Gemma2": {"head_dim": 8},  # capped logits, sliding windows
    "Gemma3Text": {"head_dim": 8},  # rotary tables of each type of layer
    "Glm": {"head_dim": 16},  # rotation of half the channels
    "Phi3": {},  # one projection of queries, keys and values
    "Cohere": {"use_qk_norm": True},
    "Qwen2_5_VLText": {"rope_parameters": MROPE},
    "Exaone4": {"sliding_window": 6},  # norms the output of attention, not its input; full layers do not rotate
    "Chameleon": {"swin_norm": True, "vocabulary_map": {}, "vq_config": VQ},  # so too, under the name of the other norm
    "MuseGlimmerText": {"head_dim": 8, "layer_rope_theta": [1e4, 1e4, 0, 1e4]},  # a layer that does not rotate
    "Gemma4UnifiedText": {"head_dim": 8, "global_head_dim": 16},  # its attention takes a further argument
    "DeepseekV3": LATENT,  # keys and values from latents
}
OWN_KEYS = ("Phi3", "Exaone4", "Chameleon", "DeepseekV3")  # of which no projection of normed states can be handed on


class Looking(Strategy):
    """Keeps two thirds from layer 1 on, and half of these from layer 2 on, as attention computed ahead says."""

    name = "looking"

    def __init__(self, decide: Callable[[Tokens], Decision] | None = None, positions: str = "keep") -> None:
        super().__init__()
        self.decide, self.positions = decide or best, positions
        self.ahead = self.back = torch.empty(0)

    def stages(self, shape: Shape) -> Iterator[Stage]:
        yield Stage("thin", 1)
        yield Stage("look", 2, reads=(AHEAD, HiddenStates()), positions=self.positions)
        yield Stage("look back", 3, reads=(BACK,))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        if stage.name == "thin":
            after = tokens.text & (tokens.images_before == tokens.counts[:, None])
            after[1:, 8:] = False  # fewer query rows in one batch row
            tokens.mark("raters", after)
            return Keep.where(tokens.active & (torch.arange(tokens.active.shape[1]) % 3 > 0))
        if stage.name == "look":
            self.ahead = tokens.read(AHEAD)
            return self.decide(tokens)
        self.back = tokens.read(BACK)
        return Keep.where(tokens.active)


def everything(tokens: Tokens) -> Decision:
    return Keep.where(tokens.active)


def best(tokens: Tokens) -> Decision:
    order = tokens.active.long().cumsum(1)
    return Keep.where(tokens.active & (order % 2 > 0))


def merged(tokens: Tokens) -> Decision:
    """The first token gets a value of its own."""
    kept = tokens.active & (tokens.active.long().cumsum(1) == 1)
    weights = tokens.active.float()[:, None] / tokens.counts[:, None, None]
    return Merge(kept.long().argmax(1, keepdim=True), weights=weights)


def inputs(padding: str | None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padding:
        mask[1, slice(0, 5) if padding == "left" else slice(15, 20)] = 0
    return {"inputs_embeds": torch.randn(2, LENGTH, WIDTH, generator=draw), "attention_mask": mask}


def marks() -> Tensor:
    image = torch.zeros(2, LENGTH, dtype=torch.bool)
    image[0, 3:13], image[1, 6:12] = True, True
    return image


def prefill(model: Any, strategy: Strategy, padding: str | None = None) -> tuple[Tensor, Any]:
    """The last states, and the run."""
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks()) as run:
        return model(**inputs(padding), use_cache=False)[0], run


def looked(run: Any) -> LookAhead:
    (found,) = run.trace.ledger.entries[2].ahead
    assert isinstance(found, LookAhead)
    return found


def decoder(kind: str, attention: str = "eager") -> Any:
    extra = DECODERS[kind]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    name = kind.removesuffix("Text") if kind.endswith("VLText") else kind
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **extra}, attn_implementation=attention)
    torch.manual_seed(0)
    if kind == "Qwen2_5_VLText":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        return Qwen2_5_VLTextModel(config).eval()
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_it_is_the_attention_of_the_layer(kind: str, attention: str, padding: str | None, positions: str) -> None:
    """A stage that keeps everything: the layer's own attention is what was computed ahead."""
    if kind == "Gemma2" and attention == "sdpa":
        pytest.skip("transformers computes capped logits only in eager attention")
    if kind == "Qwen2_5_VLText" and positions == "renumber":
        pytest.skip("not defined for several axes")
    model, strategy = decoder(kind, attention), Looking(everything, positions)
    prefill(model, strategy, padding)
    torch.testing.assert_close(strategy.ahead, strategy.back, atol=1e-5, rtol=1e-4)


def test_queries_are_projected_in_the_needed_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_llama(LAYERS, kv_heads=2).model, []
    query: Any = model.layers[2].self_attn.q_proj
    own = query.forward
    monkeypatch.setattr(query, "forward", lambda states: seen.append(tuple(states.shape[:2])) or own(states))
    _, run = prefill(model, Looking())
    entered, kept = (run.trace.ledger.entries[layer].width for layer in (1, 2))
    assert seen == [(2, 7), (2, kept)]
    assert looked(run) == LookAhead(keys=entered, queries=7, scored=7, reused=kept)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3Text", "Phi3", "Qwen2_5_VLText", "Exaone4"])
def test_the_account_is_what_is_computed(kind: str, padding: str | None) -> None:
    model = decoder(kind)
    with flop_counter() as counter:
        _, run = prefill(model, Looking(), padding)
    assert (looked(run).reused > 0) == (kind not in OWN_KEYS)
    assert (looked(run).values > 0) == (kind == "Phi3")
    assert count_flops(run.trace.ledger, DecoderSpec.from_config(model.config)).total == counter.get_total_flops()


def test_queries_made_of_latents_are_counted_in_every_row() -> None:
    _, run = prefill(decoder("DeepseekV3"), Looking())
    entered = run.trace.ledger.entries[1].width
    assert looked(run) == LookAhead(keys=entered, queries=entered, values=entered, scored=7)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind not in OWN_KEYS])
def test_handing_keys_on_changes_nothing(kind: str, padding: str | None) -> None:
    model = decoder(kind)
    found, run = prefill(model, Looking(), padding)
    assert looked(run).reused == run.trace.ledger.entries[2].width
    hook = model.layers[2].self_attn.k_proj.register_forward_pre_hook(lambda module, args: None)
    expected, alone = prefill(model, Looking(), padding)
    hook.remove()
    assert looked(alone).reused == 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_stage_that_keeps_all_tokens_is_exact() -> None:
    model: Any = tiny_llama(LAYERS).model
    strategy = tp.strategy("pyramiddrop", layers=(1, 2), keep=(1.0, 1.0))
    found, run = prefill(model, strategy)
    assert looked(run).reused == LENGTH
    with torch.no_grad():
        assert torch.equal(found, model(**inputs(None), use_cache=False)[0])


class Restoring(Looking):
    """Brings all tokens of the image back where it looks."""

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        if stage.name == "look":
            self.ahead = tokens.read(AHEAD)
            return Restore.where(tokens.parked)
        decision = super().choose(stage, tokens)
        if stage.name == "thin":
            assert isinstance(decision, Keep)
            return Keep.where(tokens.active & (torch.arange(tokens.active.shape[1]) % 3 > 0), rest="park")
        return decision


def with_moving_norm(model: Any) -> None:
    """Its output differs from call to call."""
    norm, calls = model.layers[2].input_layernorm, []
    norm.register_forward_hook(lambda module, args, output: (calls.append(1), output * (1 + 0.1 * len(calls)))[1])


def with_another_projection(model: Any) -> None:
    class Scaled(nn.Linear):
        pass

    model.layers[2].self_attn.k_proj.__class__ = Scaled


@pytest.mark.parametrize("change", [with_moving_norm, with_another_projection])
def test_a_layer_that_may_have_other_keys_computes_them(change: Callable[[Any], None]) -> None:
    model = tiny_llama(LAYERS).model
    change(model)
    _, run = prefill(model, Looking())
    assert looked(run).reused == 0


def test_keys_of_states_that_the_stage_changes_are_computed_again() -> None:
    model: Any = tiny_llama(LAYERS).model
    found, run = prefill(model, Looking(merged))
    assert looked(run).reused == 0
    model.layers[2].self_attn.k_proj.register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(found, prefill(model, Looking(merged))[0])


def test_keys_of_restored_tokens_are_computed() -> None:
    model: Any = tiny_llama(LAYERS).model
    found, run = prefill(model, Restoring())
    assert looked(run).reused == 0
    model.layers[2].self_attn.k_proj.register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(found, prefill(model, Restoring())[0])


def compiled_model(model: Any) -> None:
    model.compile(backend="eager")


def compiled_layer(model: Any) -> None:
    model.layers[2].compile(backend="eager")


def compiled_attention(model: Any) -> None:
    model.layers[2].self_attn.compile(backend="eager")


def wrapped_attention(model: Any) -> None:
    model.layers[2].self_attn = torch.compile(model.layers[2].self_attn, backend="eager")


@pytest.mark.parametrize("compiled", [compiled_model, compiled_layer, compiled_attention, wrapped_attention])
def test_compiled_layers_compute_their_keys(compiled: Callable[[Any], None]) -> None:
    model: Any = tiny_llama(LAYERS).model
    expected, _ = prefill(model, Looking())
    compiled(model)
    found, run = prefill(model, Looking())
    assert looked(run).reused == 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradients_take_the_layers_own_keys() -> None:
    model: Any = tiny_llama(LAYERS).model
    with tp.prune(model, Looking(), image_tokens=marks()) as run:
        model(**inputs(None), use_cache=False)[0].sum().backward()
    assert looked(run).reused == 0
    weight = model.layers[2].self_attn.k_proj.weight
    found, weight.grad = weight.grad, None
    assert found.abs().sum() > 0


@pytest.mark.parametrize("part", ["q_proj", "v_proj", "o_proj"])
def test_nothing_is_left_after_an_error_in_the_layer(part: str) -> None:
    model: Any = tiny_llama(LAYERS).model
    expected, _ = prefill(model, Looking())
    before, calls = state(model), []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first call is the one ahead
            raise RuntimeError("broken")

    hook = getattr(model.layers[2].self_attn, part).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        prefill(model, Looking())
    hook.remove()
    assert state(model) == before
    assert torch.equal(prefill(model, Looking())[0], expected)


def test_keys_read_without_padding_are_handed_on_too() -> None:
    """Rows that are padded on the left are rotated apart for the read, but the projection is the layer's."""

    class Keys(Looking):
        def stages(self, shape: Shape) -> Iterator[Stage]:
            yield Stage("keys", 3, reads=(LayerKeys(),))

        def choose(self, stage: Stage, tokens: Tokens) -> Decision:
            return Keep.where(tokens.active)

    model: Any = tiny_llama(LAYERS, kv_heads=2).model
    found, run = prefill(model, Keys(), "left")
    assert looked(run) == LookAhead(keys=LENGTH, queries=0, reused=LENGTH)
    with torch.no_grad():
        assert torch.equal(found, model(**inputs("left"), use_cache=False)[0])


def test_keys_are_handed_on_in_inference_mode_too() -> None:
    """Its tensors do not tell whether they were modified: their values are compared."""
    model: Any = tiny_llama(LAYERS, kv_heads=2).model
    expected, run = prefill(model, Looking())
    with torch.inference_mode():
        found, again = prefill(model, Looking())
    assert looked(again) == looked(run)
    assert looked(run).reused
    assert torch.equal(found, expected)
    with_moving_norm(model)
    with torch.inference_mode():
        assert looked(prefill(model, Looking())[1]).reused == 0
