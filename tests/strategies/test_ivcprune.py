"""IVC-Prune against the reference runs of the authors' decoders, and what holds for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Reference, run, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import CHANNELS, HEADS, Bench
from torch import Tensor
from torch.nn.functional import linear

import tokenprune as tp
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune.testing.kit import invariants
from tokenprune.testing.kit.cases import Case, Row
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune_strategies.ivcprune.ivcprune import IVCPrune
from tokenprune_strategies.ivcprune.numbers import coordinates_of, seeds_of
from tokenprune_strategies.ivcprune.scores import ValueScores, coordinate_means, text_after, value_scores
from tokenprune_strategies.ivcprune.selection import places, selected

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 40), min_size=1, max_size=3)
BATCH = st.lists(IMAGES, min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 90), st.floats(0.01, 1))
SHARES = st.one_of(st.none(), st.floats(0, 0.5))
VARIANTS = st.sampled_from(["qwen", "llava"])


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("ivcprune"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return Reference(case.about["llama"], case.tensors).llama(request.param)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def qwen(request: pytest.FixtureRequest, case: Reference) -> Any:
    """Their Qwen2.5-VL decoder, without the head."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    dims = dict(case.about["qwen"]["dims"])
    rope = {"rope_type": "default", "rope_theta": dims.pop("rope_theta"), "mrope_section": dims.pop("mrope_section")}
    del dims["attention_bias"]  # its queries, keys and values always have one
    config = Qwen2_5_VLTextConfig(**dims, rope_parameters=rope, attn_implementation=request.param)
    model = Qwen2_5_VLTextModel(config).eval()
    prefix = "qwen.weights."
    weights = {n.removeprefix(prefix): t.float() for n, t in case.tensors.items() if n.startswith(prefix)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing
    assert unexpected == ["lm_head.weight"]
    return model


def seen_by(strategy: Any) -> tuple[ValueScores, Tensor]:
    """Scores and means of the one image of a watched run."""
    (_, tokens, _) = strategy.seen[0]
    (image,) = tokens.images()
    among_all = strategy.options.variant == "llava"
    found = value_scores(tokens, image, text_after(tokens, image, faithful=True), among_all=among_all)
    return found, coordinate_means(tokens.rotary_tables)[0]


def highest(values: Tensor, count: int) -> list[int]:
    return values.argsort(descending=True, stable=True)[:count].tolist()


@pytest.mark.parametrize("setting", [0, 1])
def test_golden_of_llava_with_decoding(setting: int, llama: Any, case: Reference) -> None:
    about, tensors, name = case.about["llama"], case.tensors, f"setting{setting}"
    chosen, marks = about["settings"][setting], Reference(about, tensors).image_tokens()
    strategy = watched(IVCPrune)(variant="llava", layer=chosen["ivcp_k"], faithful=True)
    found = run(llama, strategy, tensors["inputs_embeds"], marks, tensors[f"{name}.decode_token_ids"].tolist())
    said, means = seen_by(strategy)
    torch.testing.assert_close(said.text, tensors[f"{name}.seed_scores"], atol=1e-6, rtol=0)
    torch.testing.assert_close(said.scores, tensors[f"{name}.foreground_scores"], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[:, 0], tensors[f"{name}.cos_mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[:, 1], tensors[f"{name}.sin_mean"], atol=1e-6, rtol=0)
    assert said.seeds.tolist() == tensors[f"{name}.seeds"].tolist()
    assert highest(said.scores, chosen["foreground"]) == tensors[f"{name}.foreground"].tolist()
    by_angle = highest(means[:, 0], chosen["ivc_each"]) + highest(means[:, 1], chosen["ivc_each"])
    assert by_angle == tensors[f"{name}.ivc"].tolist()
    assert found.trace.stages[0].kept[0] == tensors[f"{name}.kept_image"].tolist()
    assert found.rows() == tensors[f"{name}.kept_positions"].tolist()
    entries = found.trace.ledger.entries
    assert [entry.image[0] + entry.other[0] for entry in entries] == chosen["layer_input_lengths"]
    assert [entry.in_cache[0] + entry.other[0] for entry in entries] == chosen["kv_lengths_after_prefill"]
    assert found.kv_lengths == chosen["kv_lengths_after_decode"]
    torch.testing.assert_close(found.logits[:, found.rows()], tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.decoded, tensors[f"{name}.decode_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("setting", [0, 1])
def test_golden_of_qwen_with_decoding(setting: int, faithful: bool, qwen: Any, case: Reference) -> None:
    about, tensors, name = case.about["qwen"], case.tensors, f"qwen.setting{setting}"
    chosen, head = about["settings"][setting], tensors["qwen.weights.lm_head.weight"].float()
    marks, ids = Reference(about, tensors).image_tokens(), tensors["qwen.position_ids"]
    strategy = watched(IVCPrune)(layer=chosen["ivcp_k"], faithful=faithful)
    with torch.no_grad(), tp.prune(qwen, strategy, image_tokens=marks) as pruning:
        states = qwen(inputs_embeds=tensors["qwen.inputs_embeds"].float(), position_ids=ids, use_cache=True)
        cache, steps = states.past_key_values, []
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        for step, token in enumerate(tensors[f"{name}.decode_token_ids"].tolist(), 1):
            after = ids.amax() + torch.full((3, 1, 1), step)
            given = {"input_ids": torch.tensor([[token]]), "position_ids": after}
            steps.append(linear(qwen(**given, past_key_values=cache, use_cache=True)[0][0, -1], head))
    said, means = seen_by(strategy)
    torch.testing.assert_close(said.text, tensors[f"{name}.seed_scores"], atol=1e-6, rtol=0)
    torch.testing.assert_close(said.scores, tensors[f"{name}.scores"], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[:, 0], tensors[f"{name}.cos_mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[:, 1], tensors[f"{name}.sin_mean"], atol=1e-6, rtol=0)
    assert said.seeds.tolist() == tensors[f"{name}.seeds"].tolist()
    by_cos, by_sin = tensors[f"{name}.ivc"].tensor_split(2)
    assert set(highest(means[:, 0], chosen["ivc_each"])) == set(by_cos.tolist())  # in each, some are equal
    assert set(highest(means[:, 1], chosen["ivc_each"])) == set(by_sin.tolist())
    assert set(tensors[f"{name}.priority"].tolist()) == {*by_cos.tolist(), *by_sin.tolist(), *said.seeds.tolist()}
    (stage,) = pruning.trace.stages
    assert stage.kept[0] == tensors[f"{name}.kept_image"].tolist()
    entries = pruning.trace.ledger.entries
    assert [entry.image[0] + entry.other[0] for entry in entries] == chosen["layer_input_lengths"]
    assert [entry.in_cache[0] + entry.other[0] for entry in entries] == chosen["kv_lengths_after_prefill"] == lengths
    rows = tensors[f"{name}.kept_rows"]
    torch.testing.assert_close(states[0][:, rows], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(linear(states[0][:, rows], head), tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(steps), tensors[f"{name}.decode_logits"], atol=1e-4, rtol=0)


def similarity(query: Tensor, keys: list[Tensor]) -> list[float]:
    """Softmax over the keys, mean over heads, in plain Python."""
    result = [0.0] * len(keys)
    for head in range(HEADS):
        products = [math.exp(float(query[head] @ key[head]) / CHANNELS**0.5) for key in keys]
        result = [known + one / sum(products) / HEADS for known, one in zip(result, products, strict=True)]
    return result


def slowly(text: list[Tensor], own: list[Tensor], others: list[Tensor], tables: Tensor, options: Any) -> list[int]:
    """The tokens of one image in the order in which they are kept, step by step; the text is what counts."""
    size = len(own)
    rows = [similarity(word, own + others)[:size] for word in text]
    mean = [sum(column) / len(text) for column in zip(*rows, strict=True)]
    seeds = sorted(range(size), key=lambda token: -mean[token])[: max(1, round(0.01 * size))]
    rows += [similarity(own[seed], own + others)[:size] for seed in seeds]
    scores = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    share = options.coordinates
    share = {"qwen": 0.1, "llava": 0.05}[options.variant] if share is None else share
    lists = [sorted(range(size), key=lambda token: -float(tables[token, part].mean())) for part in (0, 1)]
    ivc = [token for pair in zip(*lists, strict=True) for token in sorted(pair)][: 2 * round(share * size)]
    return [*dict.fromkeys([*sorted(seeds), *ivc, *sorted(range(size), key=lambda token: -scores[token])])]


@QUICK
@given(BATCH, AMOUNTS, SHARES, VARIANTS)
def test_every_image_of_every_row_is_as_the_slow_reference(
    rows: list[list[int]], keep: int | float, share: float | None, variant: str
) -> None:
    strategy = IVCPrune(keep=keep, coordinates=share, variant=variant)
    made = Bench(strategy, rows)
    planned = made.planned[0]
    given = {read.field: made.provide(read) for read in planned.stage.reads}
    images = made._view(planned, made.state, planned.target).images()
    kept = made.run().trace.stages[0].kept
    for row, sizes in enumerate(rows):
        assert kept[row] == Bench(strategy, [sizes], seeds=[row]).run().trace.stages[0].kept[0]
        total, words = sum(sizes), len(sizes) + 2
        values, text = [*given["layer_values"][row, :total]], [*given["text_values"][row, :words]]
        expected: list[int] = []
        for image in (image for image in images if image.row == row):
            # a text token before each image, and two at the end, which do not count unless there are no others
            behind = text[image.image + 1 :]
            counted = behind[2:] or behind
            own = [values[token] for token in image.index.tolist()]
            others = [value for token, value in enumerate(values) if token not in image.index.tolist()] + text
            tables = given["rotary_tables"][row, image.index, 0]
            order = slowly(counted, own, others if variant == "llava" else [], tables, strategy.options)
            expected += image.index[torch.tensor(order[: image.quota], dtype=torch.int64)].tolist()
        assert kept[row] == sorted(expected)


def scored(size: int) -> tuple[ValueScores, Tensor]:
    draw = torch.Generator().manual_seed(size)
    text, scores = torch.rand(2, size, generator=draw)
    found = ValueScores(text, text.argsort(descending=True)[: seeds_of(size)], scores)
    return found, torch.rand(size, 2, generator=draw)


@QUICK
@given(st.integers(1, 300), AMOUNTS, SHARES)
def test_faithful_keeps_all_seeds_and_coordinates_and_is_the_default_where_they_fit(
    size: int, keep: int | float, share: float | None
) -> None:
    found, means = scored(size)
    strategy = IVCPrune(keep=keep, coordinates=share, faithful=True)
    each, target = (
        coordinates_of(strategy.options, size),
        min(keep, size) if isinstance(keep, int) else round(keep * size),
    )
    first = {*highest(means[:, 0], each), *highest(means[:, 1], each), *found.seeds.tolist()}
    kept = set(selected(strategy.options, 0, found, means).nonzero().flatten().tolist())
    assert first <= kept
    assert len(kept) == max(target, len(first))
    ours = selected(IVCPrune(coordinates=share).options, target, found, means)
    assert int(ours.sum()) == target
    if target >= len(first):
        assert set(ours.nonzero().flatten().tolist()) == kept
    else:
        assert set(ours.nonzero().flatten().tolist()) <= first


@QUICK
@given(st.integers(1, 300), SHARES)
def test_llavas_faithful_choice_is_a_union(size: int, share: float | None) -> None:
    found, means = scored(size)
    options = IVCPrune(coordinates=share, variant="llava", faithful=True).options
    each = coordinates_of(options, size)
    expected = {*highest(means[:, 0], each), *highest(means[:, 1], each), *found.seeds.tolist()}
    expected |= {*highest(found.scores, round(0.2 * size))}
    assert set(selected(options, 0, found, means).nonzero().flatten().tolist()) == expected


def test_cells_with_height_and_width_exchanged_are_equal() -> None:
    cells = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    positions = torch.cat((torch.full((81, 1), 7), 7 + cells), 1)  # time, height, width
    angles = positions[..., None] * 10000.0 ** (-torch.arange(8) / 8)
    means = coordinate_means(torch.stack((angles.cos(), angles.sin()), -2)[None])[0]
    exchanged = means.reshape(9, 9, 2).transpose(0, 1).reshape(81, 2)
    assert torch.equal(means, exchanged)
    assert places(torch.tensor([1.0, 3.0, 3.0, 2.0])).tolist() == [3, 0, 1, 2]


def kept_of(marks: Tensor, strategy: IVCPrune) -> list[list[int]]:
    """What stays of a prompt of random states."""
    embeds = torch.randn(*marks.shape, 32, generator=torch.Generator().manual_seed(0))
    model = tiny_llama(4)
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks) as found:
        assert model(inputs_embeds=embeds).logits.isfinite().all()
    kept: list[list[int]] = found.trace.stages[0].kept
    return kept


@pytest.mark.parametrize("behind", [0, 1, 2, 3])
@pytest.mark.parametrize("variant", ["qwen", "llava"])
def test_prompts_with_little_text_behind_the_image(variant: str, behind: int) -> None:
    """The authors' code needs three tokens; by default any prompt is pruned."""
    marks = torch.tensor([[False] * 3 + [True] * 20 + [False] * behind])
    assert len(kept_of(marks, IVCPrune(variant=variant, keep=7))[0]) == 7
    faithful = IVCPrune(variant=variant, faithful=True)
    if behind < 3:
        with pytest.raises(OptionError, match=f"'faithful': found {behind} text tokens behind an image"):
            kept_of(marks, faithful)
    else:
        assert kept_of(marks, faithful)[0]


@pytest.mark.parametrize("variant", ["qwen", "llava"])
def test_prompts_of_nothing_but_an_image_are_pruned_too(variant: str) -> None:
    marks = torch.tensor([[False] + [True] * 20])
    assert len(kept_of(marks, IVCPrune(variant=variant, keep=7))[0]) == 7


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"variant": "llava"}, {"variant": "llava", "faithful": True}, {"faithful": True}]
)
def test_it_is_the_masked_oracle_with_shorter_caches(options: dict[str, Any], padding: str, positions: str) -> None:
    rows = tuple(
        Row(images, 2, 6, seed=number) for number, images in enumerate([((4, 4),), ((3, 6), (2, 5)), ((1, 9),)])
    )
    case, strategy = Case("grouped-kv", rows, padding, None), IVCPrune(positions=positions, **options)
    invariants.row_equals_row_alone(case, strategy)
    invariants.equals_oracle(case, strategy)
    invariants.cached_equals_recomputed(case, strategy)


@QUICK
@given(st.integers(2, 40), st.integers(1, 700), st.floats(0.01, 1), VARIANTS)
def test_budgets_are_met_within_a_token(layers: int, total: int, budget: float, variant: str) -> None:
    shape = Shape(layers, total)
    try:
        bound = IVCPrune(budget=budget, variant=variant).bind(shape)
    except BudgetError:
        assert (total + layers - 1) / layers > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_budgets_lower_the_layer_only_where_seeds_and_coordinates_need_it() -> None:
    shape = Shape(32, 576)
    chosen = {budget: IVCPrune(budget=budget).bind(shape).options for budget in (0.75, 0.61, 0.35, 0.2)}
    assert {budget: options.layer for budget, options in chosen.items()} == {0.75: 16, 0.61: 16, 0.35: 5, 0.2: 1}
    assert chosen[0.75].keep == 288
    assert all(options.keep >= 6 + 2 * 58 for budget, options in chosen.items() if budget > 0.2)
    assert IVCPrune(budget=0.35, keep=100).bind(shape).options.keep == 100
    with pytest.raises(BudgetError, match=r"'ivcprune' cannot meet budget 0\.35"):
        IVCPrune(budget=0.35, layer=16).bind(shape)
    with pytest.raises(BudgetError, match="faithful=True the number of tokens depends on the image"):
        IVCPrune(budget=0.6, faithful=True)


def test_published_numbers() -> None:
    options = IVCPrune(variant="llava").options
    assert (seeds_of(576), round(0.2 * 576), coordinates_of(options, 576)) == (6, 115, 29)
    (stage,) = IVCPrune().stages(Shape(32, 576))
    assert (stage.layer, stage.tokens, stage.prune_earlier_caches, stage.caches_from) == (16, 288, True, 0)
    (stage,) = IVCPrune(variant="llava", faithful=True).stages(Shape(32, 576))
    assert (stage.layer, stage.tokens, stage.prune_earlier_caches, stage.caches_from) == (16, None, True, 1)


def test_bad_options_are_named() -> None:
    with pytest.raises(OptionError, match="'layer': found 12, but the model has 12 layers"):
        list(IVCPrune(layer=12).stages(Shape(12, 16)))
    with pytest.raises(OptionError, match="'ivcprune': option 'keep' has no effect"):
        tp.strategy("ivcprune", variant="llava", faithful=True, keep=0.5)
    for bad in ({"keep": 0}, {"coordinates": 0.6}, {"variant": "other"}, {"layer": 0}, {"positions": "move"}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            tp.strategy("ivcprune", **bad)
