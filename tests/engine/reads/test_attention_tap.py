"""The attention tap against transformers' own eager attention weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen3Config,
    Qwen3Model,
)

from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.engine.reads.attention_tap import AttentionCall, tap
from tokenprune.errors import UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama


def eager_weights(model, layer, **inputs):
    """Attention weights of a layer as eager attention gives them: [batch, heads, S, S]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=True).attentions[layer]
    finally:
        model.set_attn_implementation(before)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["sdpa", "eager"]),
    st.sampled_from([4, 2, 1]),
    st.integers(0, 10**6),
    st.sampled_from(["none", "left", "right"]),
    st.integers(0, 3),
)
def test_rows_equal_eager_attention(attention, kv_heads, seed, padding, layer):
    model = tiny_llama(4, kv_heads=kv_heads, attention=attention, seed=seed)
    torch.manual_seed(seed)
    mask = torch.ones(2, 12, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 4) if padding == "left" else slice(8, 12)] = 0
    inputs = {"input_ids": torch.randint(0, 64, (2, 12)), "attention_mask": mask}
    if padding == "none":
        del inputs["attention_mask"]
    rows = torch.stack([row.nonzero().flatten()[[2, 5, -1]] for row in mask])
    got = []
    module = model.model.layers[layer].self_attn
    with torch.no_grad(), tap({module: lambda seen: got.append(seen.attention(rows))}):
        model(**inputs)
    expected = eager_weights(model, layer, **inputs)
    for row in range(2):
        assert torch.allclose(got[0][row], expected[row][:, rows[row]], atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_softcap_query_norm_and_sliding_windows(name):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "initializer_range": 0.3}
    if name == "gemma2":
        config = Gemma2Config(**sizes, attn_logit_softcapping=0.7, sliding_window=4, attn_implementation="eager")
        model = Gemma2Model(config).eval()
    else:
        model = Qwen3Model(Qwen3Config(**sizes, attn_implementation="sdpa")).eval()
    ids = torch.randint(0, 64, (2, 10))
    rows = torch.tensor([[9, 4], [7, 0]])
    for layer in range(2):
        got = []
        with (
            torch.no_grad(),
            tap({model.layers[layer].self_attn: lambda seen, got=got: got.append(seen.attention(rows))}),
        ):
            model(ids)
        expected = eager_weights(model, layer, input_ids=ids)
        for row in range(2):
            assert torch.allclose(got[0][row], expected[row][:, rows[row]], atol=1e-5)


def test_a_tower_shows_its_cls_row_and_keys():
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    tower = CLIPVisionModel(config).eval()
    pixels = torch.randn(2, 3, 28, 28)
    seen_by = []
    modules = [module for module in tower.modules() if type(module).__name__ == "CLIPAttention"]
    with torch.no_grad(), tap({modules[-1]: seen_by.append}):
        tower(pixels)
    expected = eager_weights(tower, -1, pixel_values=pixels)
    assert torch.allclose(
        seen_by[0].attention(torch.zeros(2, 1, dtype=torch.long))[:, :, 0], expected[:, :, 0], atol=1e-5
    )
    assert seen_by[0].key.shape == (2, 4, 17, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_see_what_an_additive_mask_shows(dtype):
    """Which hides by the smallest number of its own type."""
    shown = torch.ones(1, 1, 4, 4).tril().bool()
    mask = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)
    states = torch.randn(1, 2, 4, 8, dtype=dtype)
    call = AttentionCall(states, states, states, mask, 1.0, causal=False)
    assert torch.equal(call.visible(torch.arange(4)[None]), shown)
    among = torch.tensor([[False, False, True, True]])
    assert not call.attention(torch.tensor([[1]]), among).any()


def test_several_sequences_in_one_are_read_apart():
    """Flash attention is told their ends, and gets no mask."""

    def flash(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is None:
            pytest.skip("this release of transformers does not tell its towers the ends of sequences")
        parts = [part.split(cu_seq_lens_q.diff().tolist(), 2) for part in (query, key, value)]
        scale = {"scale": kwargs["scaling"]}
        done = [scaled_dot_product_attention(*part, **scale) for part in zip(*parts, strict=True)]
        return torch.cat(done, 2).transpose(1, 2), None

    AttentionInterface.register("flash_attention_test", flash)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = PixtralVisionModel(PixtralVisionConfig(**sizes, head_dim=8, patch_size=4, image_size=32)).eval()
    module, pixels, found = tower.transformer.layers[0].attention, torch.randn(2, 3, 16, 12), []
    expected = tower(pixels).last_hidden_state
    every = torch.arange(24)[None]
    with torch.no_grad():
        with tap({module: found.append}):
            tower(pixels)
        tower.config._attn_implementation = "flash_attention_test"
        with tap({module: found.append}):
            states = tower(pixels).last_hidden_state
    assert torch.allclose(states, expected, atol=1e-5)
    assert found[1].mask is not None
    assert torch.allclose(found[0].attention(every), found[1].attention(every), atol=1e-6)


class VisionCapture(Strategy):
    """Drops half of the image tokens at layer 1 and shows the attention of the stage at layer 3."""

    name = "watch"

    def __init__(self, seen, reduce="mean"):
        super().__init__()
        self.seen, self.reduce = seen, reduce

    def stages(self, shape):
        yield Stage("drop", 1)
        yield Stage("look", 3, reads=AttentionFrom("probe", reduce=self.reduce))

    def choose(self, stage, tokens):
        if stage.name == "drop":
            odd = (torch.arange(tokens.exists.shape[1]) % 2).bool()
            return Keep.where(tokens.active & odd)
        self.seen.append(tokens.attention)
        return Keep.where(tokens.active)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_inside_a_pruned_stage(attention, reduce):
    """On the shortened sequence the softmax runs over the keys that are still there, and only active tokens have
    scores."""
    model = tiny_llama(4, kv_heads=2, attention=attention)
    ids = torch.randint(0, 64, (2, 14))
    image = torch.zeros(2, 14, dtype=torch.bool)
    image[0, 1:9] = True
    image[1, 4:10] = True
    probe = torch.zeros(2, 14, dtype=torch.bool)
    probe[0, [11, 13]] = True
    probe[1, 12] = True
    seen, inner = [], []
    with torch.no_grad(), prune(model, VisionCapture(seen, reduce), image_tokens=image, queries={"probe": probe}):
        hook = model.model.layers[2].self_attn.register_forward_hook(lambda m, a, o: inner.append(o[1]))
        model(ids)
        hook.remove()
    assert seen[0].shape == (2, 8)
    kept = torch.isfinite(seen[0])
    assert kept.tolist() == [[False, True] * 4, [False, True, False, True, False, True, False, False]]
    if attention == "eager":  # eager attention hands out its weights: compare row by row
        weights = inner[0].mean(1)  # rows of 14 - 4 and 14 - 3 tokens, row 0 filled up at the end
        row0 = weights[0, [7, 9], 1:5]
        row1 = weights[1, [9], 4:7]
        pick = (lambda rows: rows.mean(0)) if reduce == "mean" else (lambda rows: rows.amax(0))
        assert torch.allclose(seen[0][0][kept[0]], pick(row0), atol=1e-5)
        assert torch.allclose(seen[0][1][kept[1]], pick(row1), atol=1e-5)


def test_tap_leaves_the_config_as_it_was_and_does_not_stack():
    model = tiny_llama(2)
    module = model.model.layers[0].self_attn
    before = module.config
    with tap({module: lambda seen: None}):
        assert module.config is not before
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(UnsupportedError, match="is already tapped"), tap({module: lambda seen: None}):
            pass
    assert module.config is before
    assert "_tokenprune_tap" not in module.__dict__
    with pytest.raises(UnsupportedError, match="attention interface"), tap({torch.nn.Linear(2, 2): lambda seen: None}):
        pass
