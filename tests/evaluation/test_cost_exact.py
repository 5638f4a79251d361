"""The exact convention against what PyTorch counts on real runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tokenprune.core.ledger import LayerEntry, Ledger
from tokenprune.cost import DecoderSpec, count_flops, flop_counter, kv_bytes, measure_flops
from tokenprune.errors import InputError, OptionError, UnknownNameError, UnsupportedError


def tiny_llama(
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 8,
    intermediate: int = 96,
    attention: str = "sdpa",
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def full_ledger(layers: int, rows: int, width: int, image: int) -> Ledger:
    tokens, others = (image,) * rows, (width - image,) * rows
    return Ledger(tokens, others, [LayerEntry(layer, tokens, others, width) for layer in range(layers)], width)


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 3),
    group=st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 1)]),
    head_dim=st.sampled_from([8, 16]),
    intermediate=st.sampled_from([64, 96]),
    attention=st.sampled_from(["sdpa", "eager"]),
    rows=st.integers(1, 3),
    width=st.integers(5, 40),
    padded=st.booleans(),
)
def test_exact_equals_flop_counter_unpruned(
    layers: int,
    group: tuple[int, int],
    head_dim: int,
    intermediate: int,
    attention: str,
    rows: int,
    width: int,
    padded: bool,
) -> None:
    model = tiny_llama(
        layers=layers,
        heads=group[0],
        kv_heads=group[1],
        head_dim=head_dim,
        intermediate=intermediate,
        attention=attention,
    )
    mask = torch.ones(rows, width, dtype=torch.long)
    mask[0, : 2 * padded] = 0
    x = torch.randn(rows, width, 32)
    counted = measure_flops(model, inputs_embeds=x, attention_mask=mask)
    spec = DecoderSpec.from_config(model.config)
    ours = count_flops(full_ledger(layers, rows, width, 3), spec, logit_positions=width)
    assert ours.total == counted


def test_exact_counts_lm_head_where_it_runs() -> None:
    model = tiny_llama()
    counted = measure_flops(model, inputs_embeds=torch.randn(2, 9, 32), logits_to_keep=1)
    ours = count_flops(full_ledger(2, 2, 9, 3), DecoderSpec.from_config(model.config), logit_positions=1)
    assert ours.total == counted
    assert ours.lm_head == 2 * 2 * 32 * 50


def test_flop_counter_sees_fused_attention_on_cpu_and_meta() -> None:
    for device in ("cpu", "meta"):
        query, key = torch.randn(2, 4, 10, 8, device=device), torch.randn(2, 4, 12, 8, device=device)
        with flop_counter() as counter:
            torch.nn.functional.scaled_dot_product_attention(query, key, key)
        assert counter.get_total_flops() == 2 * 2 * (2 * 4 * 10 * 12 * 8)


def test_parts_sum_to_the_total() -> None:
    spec = DecoderSpec.named("7b")
    flops = count_flops(full_ledger(32, 1, 20, 10), spec, logit_positions=1, fixed={"tower": 5, "mask head": 7})
    assert sum(flops.parts.values()) == flops.total
    assert flops.parts["tower"] == 5
    assert flops.total == flops.decoder + flops.lm_head + 12


def test_scored_rows_are_counted() -> None:
    spec = DecoderSpec.of(layers=1, hidden=8, intermediate=8, heads=4, kv_heads=2, head_dim=2)
    entry = LayerEntry(0, (3, 3), (2, 2), 5, scored_rows=2)
    assert count_flops(Ledger((3, 3), (2, 2), [entry]), spec).scorer == 2 * 2 * 2 * 5 * 4 * 2


def test_ragged_rows_are_charged_for_their_fillers_in_exact_only() -> None:
    spec = DecoderSpec.of(layers=1, hidden=8, intermediate=16, heads=2)
    ragged = Ledger((6, 2), (1, 1), [LayerEntry(0, (6, 2), (1, 1), 7)])
    even = Ledger((6, 6), (1, 1), [LayerEntry(0, (6, 6), (1, 1), 7)])
    assert count_flops(ragged, spec).decoder == count_flops(even, spec).decoder
    assert count_flops(ragged, spec, "fastv").decoder < count_flops(even, spec, "fastv").decoder


def test_kv_bytes_follow_the_active_tokens_of_each_layer() -> None:
    spec = DecoderSpec.of(layers=2, hidden=32, intermediate=8, heads=4, kv_heads=2)
    ledger = Ledger((10, 4), (5, 6), [LayerEntry(0, (10, 4), (5, 6), 15), LayerEntry(1, (3, 2), (5, 6), 8)])
    bytes_ = kv_bytes(ledger, spec, element_bytes=4)
    assert bytes_.by_layer == ((2 * 2 * 8 * 4 * 15, 2 * 2 * 8 * 4 * 10), (2 * 2 * 8 * 4 * 8, 2 * 2 * 8 * 4 * 8))
    assert bytes_.total == sum(bytes_.by_row) == 2 * 2 * 8 * 4 * (15 + 10 + 8 + 8)


def test_kv_bytes_equal_the_size_of_a_real_cache() -> None:
    model = tiny_llama(kv_heads=2)
    cache = model(inputs_embeds=torch.randn(2, 9, 32), use_cache=True).past_key_values
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    spec = DecoderSpec.from_config(model.config)
    assert kv_bytes(full_ledger(2, 2, 9, 3), spec, element_bytes=4).total == real


def test_ratio_refuses_other_conventions() -> None:
    spec, ledger = DecoderSpec.named("7b"), full_ledger(32, 1, 20, 10)
    with pytest.raises(InputError, match=r"'fastv'.*'exact'"):
        count_flops(ledger, spec, "fastv").ratio(count_flops(ledger, spec))


def test_wrong_number_of_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 layers found, expected 32"):
        count_flops(full_ledger(3, 1, 20, 10), DecoderSpec.named("7b"))
    with pytest.raises(InputError, match=r"3 layers found, expected 32"):
        kv_bytes(full_ledger(3, 1, 20, 10), DecoderSpec.named("7b"))


def test_convention_and_count_are_checked() -> None:
    spec, ledger = DecoderSpec.named("7b"), full_ledger(32, 1, 20, 10)
    with pytest.raises(OptionError, match=r"'papers'.*exact, fastv, pdrop"):
        count_flops(ledger, spec, "papers")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="count='image'"):
        count_flops(ledger, spec, "exact", count="image")
    assert count_flops(ledger, spec, "fastv", count="image").decoder < count_flops(ledger, spec, "fastv").decoder


def test_spec_from_a_mapping_with_a_text_config() -> None:
    text = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    spec = DecoderSpec.from_config({"text_config": {**text, "num_key_value_heads": 2, "vocab_size": 9}})
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab) == (3, 8, 2, 8, 9)
    assert DecoderSpec.from_config(text).kv_heads == 8


def test_an_outer_product_is_no_matmul() -> None:
    assert measure_flops(torch.bmm, torch.ones(2, 3, 1), torch.ones(2, 1, 5)) == 0
    assert measure_flops(torch.bmm, torch.ones(2, 3, 2), torch.ones(2, 2, 5)) == 2 * 2 * 3 * 2 * 5
    assert measure_flops(torch.bmm, torch.ones(2, 1, 1), torch.ones(2, 1, 5)) == 2 * 2 * 5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 2}, "hidden, intermediate, heads missing"),
        ({"layers": 2, "hidden": 30, "intermediate": 8, "heads": 4}, "30 does not divide into 4 heads"),
        ({"layers": 2, "hidden": 32, "intermediate": 8, "heads": 4, "kv_heads": 3}, "4 query heads cannot share 3"),
        ({"layers": 0, "hidden": 32, "intermediate": 8, "heads": 4}, "'layers': found 0"),
        ({"layers": 2, "hidden": 32, "intermediate": 8, "heads": 4, "head": 4}, "unknown option 'head'"),
    ],
)
def test_bad_sizes_give_one_clear_line(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DecoderSpec.of(**sizes)


def test_unknown_shape_and_experts_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean '7b'"):
        DecoderSpec.named("7bb")
    with pytest.raises(UnsupportedError, match="num_experts=8"):
        DecoderSpec.from_config({"num_hidden_layers": 3, "num_experts": 8})


def test_layers_of_different_sizes_are_refused() -> None:
    """Whose configuration refuses to tell one size for all."""

    class Uneven:
        hidden_size = 8

        @property
        def num_attention_heads(self) -> int:
            raise RuntimeError("is a per-layer attribute")

    with pytest.raises(UnsupportedError, match="num_attention_heads differs between layers"):
        DecoderSpec.from_config(Uneven())
