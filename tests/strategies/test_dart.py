"""DART against the reference run of the authors' decoder, and what holds for any input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Reference, run, watched
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategy_bench import Bench

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.options import tokens_of
from tokenprune.core.reads import Embeddings, HiddenStates, LayerKeys, TextEmbeddings, TextStates
from tokenprune.core.scheduling.state import TokenState
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, OptionError
from tokenprune_strategies.dart import DART

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 40), min_size=1, max_size=3)
BATCH = st.lists(IMAGES, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("dart"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


def theirs(chosen: dict[str, Any], **options: Any) -> DART:
    """The options that a setting of the authors' means."""
    keep = chosen["max_num_trunction"]
    if chosen.get("llava_next"):
        keep = chosen["retain_token_num_for_llava_next"]
    pivots = {"image_pivots": chosen["pivot_image_token"], "text_pivots": chosen["pivot_text_token"]}
    amount = 1 - chosen["reduction_ratio"] if keep is None else keep
    return watched(DART)(**{"layer": chosen["K"], "keep": amount, "faithful": True, **pivots, **options})


@pytest.mark.parametrize("setting", [0, 1, 2, 3])
def test_golden_states_kept_tokens_logits_and_decoding(setting: int, llama: Any, case: Reference) -> None:
    chosen, tensors, name = case.about["settings"][setting], case.tensors, f"setting{setting}"
    first, images = case.about["PRE"], case.about["IMG"]
    fed = tensors[f"{name}.decode_token_ids"].tolist()
    strategy = theirs(chosen)
    found = run(llama, strategy, tensors["inputs_embeds"], case.image_tokens(), fed)
    (_, seen, _) = strategy.seen[0]
    if f"{name}.key_states" in tensors:
        keys = tensors[f"{name}.key_states"].transpose(0, 1).flatten(1)
        torch.testing.assert_close(seen.read(LayerKeys())[0], keys[first : first + images], atol=1e-5, rtol=0)
        states = tensors[f"{name}.last_layer_state"]
        torch.testing.assert_close(
            seen.read(HiddenStates(normed=True))[0], states[first : first + images], atol=1e-4, rtol=0
        )
        text = torch.cat((states[:first], states[first + images :]))
        torch.testing.assert_close(seen.read(TextStates(normed=True))[0], text, atol=1e-4, rtol=0)
    assert (tensors[f"{name}.kept_image_positions"] - first).tolist() == found.trace.stages[0].kept[0]
    assert found.rows() == tensors[f"{name}.kept_positions"].tolist()
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert lengths == chosen["hidden_state_lengths"]
    assert found.kv_lengths == chosen["kv_lengths_after_decode"]
    torch.testing.assert_close(found.logits[:, found.rows()], tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.decoded, tensors[f"{name}.decode_logits"], atol=1e-4, rtol=0)


def selected(strategy: DART, keys: torch.Tensor, states: torch.Tensor, first: int, images: int) -> list[int]:
    """What the strategy keeps of one image in a sequence of these keys [L, C] and normed states [L, width]."""
    mask = torch.zeros(1, len(keys), dtype=torch.bool)
    mask[:, first : first + images] = True
    layout, shape = SequenceLayout.from_mask(mask), Shape(32, images, len(keys) - images)
    (stage,) = strategy.stages(shape)
    given = {
        "layer_keys": layout.gather_slots(keys[None]),
        "text_keys": layout.gather_text(keys[None]),
        "hidden": layout.gather_slots(states[None]),
        "text_hidden": layout.gather_text(states[None]),
    }
    tokens = Tokens(
        stage=stage.name,
        layout=layout,
        state=TokenState.start(layout.slots >= 0),
        target=torch.tensor([stage.tokens]),
        memory={},
        seed=0,
        reads=stage.reads,
        provide=lambda read: given[read.field],
        mark=lambda name, rows: None,
    )
    answer = strategy.choose(stage, tokens)
    assert isinstance(answer, Keep)
    return [number for number in answer.index[0].tolist() if number >= 0]


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_golden_selection_at_the_size_of_llava(setting: int, case: Reference) -> None:
    about, tensors = case.about["full"], case.tensors
    chosen = about["settings"][setting]
    keys, states = tensors["full.key_states"].transpose(0, 1).flatten(1), tensors["full.last_layer_state"]
    kept = tensors[f"full.setting{setting}.kept_image_positions"] - about["image_start"]
    faithful = DART(keep=chosen["max_num_trunction"], faithful=True)
    assert selected(faithful, keys, states, about["image_start"], about["image_rows"]) == kept.tolist()
    assert len(kept) == chosen["kept_image_rows"]
    ours = DART(keep=len(kept))
    found = selected(ours, keys, states, about["image_start"], about["image_rows"])
    assert len(found) == len(kept)
    # a text before the prompt moves every place, and with it the order of the original's set; ours does not care
    longer = [torch.cat((part[:1].expand(5, -1), part)) for part in (keys, states)]
    assert selected(ours, *longer, about["image_start"] + 5, about["image_rows"]) == found


@pytest.mark.parametrize("setting", [0, 1, 2, 3])
def test_golden_order_of_pivots_is_all_that_default_changes(setting: int, case: Reference) -> None:
    chosen = case.about["settings"][setting]
    strategy = theirs(chosen, faithful=False, keep=chosen["kept_image_rows"])
    run(case.llama(), strategy, case.tensors["inputs_embeds"], case.image_tokens())
    kept = set(strategy.seen[0][2].index[0].tolist())
    reference = {row - case.about["PRE"] for row in case.tensors[f"setting{setting}.kept_image_positions"].tolist()}
    assert len(kept) == len(reference)
    assert len(kept - reference) == chosen["rows_that_change_with_norm_order"]


def test_python_sets_of_small_numbers_still_go_by_the_number_modulo_32(case: Reference) -> None:
    """What the faithful order rests on."""
    for name, order in case.tensors.items():
        if name.endswith("pivot_order"):
            setting = name.removesuffix(".pivot_order")
            if f"{setting}.image_pivots" in case.tensors:
                pivots = [*case.tensors[f"{setting}.image_pivots"], *case.tensors[f"{setting}.text_pivots"]]
                assert list({int(pivot) for pivot in pivots}) == order.tolist()


@QUICK
@given(BATCH, st.floats(0.1, 1), st.integers(1, 5), st.integers(0, 4), st.booleans())
@example([[1], [2]], 0.5, 2, 0, False)  # the shorter row has room for its pivots, the longer one has not
def test_numbers_are_as_declared_and_a_row_is_itself_in_a_batch(
    rows: list[list[int]], keep: float, image: int, text: int, faithful: bool
) -> None:
    strategy = DART(keep=keep, image_pivots=image, text_pivots=text, faithful=faithful)
    if not faithful and any(min(image, total) > tokens_of(keep, total) for total in map(sum, rows)):
        with pytest.raises(BudgetError, match=r"keeps at least its \d image pivots"):
            Bench(strategy, rows)
        return
    trace = Bench(strategy, rows).run().trace
    for row, images in enumerate(rows):
        total = sum(images)
        kept = trace.stages[0].kept[row]
        alone = Bench(strategy, [images], seeds=[row]).run().trace
        assert kept == alone.stages[0].kept[0]
        count = tokens_of(keep, total)
        if faithful:
            first = min(image, total)
            count = first + (first + text) * (min(count, total - first) // (first + text))
        assert len(kept) == count


def test_a_pivot_keeps_what_is_unlike_it() -> None:
    """Two groups of like tokens and one pivot, in the first: what is left of the room goes to the second."""
    keys = torch.ones(10, 2)
    keys[1] = 9
    states = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 3 + [[1.0, 1.0]] * 2)
    kept = selected(DART(keep=4, image_pivots=1, text_pivots=0), keys, states, 0, 8)
    assert kept == [1, 5, 6, 7]


def test_before_the_decoder_embeddings_stand_for_keys_and_states() -> None:
    """As in the decoder with the same tensors, so that only where they come from differs; positions are kept."""
    bench = Bench(DART(layer=0, keep=12, image_pivots=2, text_pivots=3), [[40]])
    assert {type(read) for stage in bench.planned for read in stage.stage.reads} == {Embeddings, TextEmbeddings}
    assert bench.planned[0].stage.layer == 0
    kept = bench.run().trace.stages[0].kept[0]
    embedded, text = bench.embeddings[0], bench.provide(TextEmbeddings())[0]
    pivots = embedded.abs().sum(-1).topk(2).indices.tolist()
    states = torch.nn.functional.normalize(torch.cat((embedded, text)), dim=-1)
    assert len(kept) == 12
    assert set(pivots) <= set(kept)
    first = (states[:40] @ states[pivots[0]]).masked_fill(torch.isin(torch.arange(40), torch.tensor(pivots)), 9)
    assert set(first.topk(2, largest=False).indices.tolist()) <= set(kept)
    assert DART(layer=0).positions == "keep"


@QUICK
@given(st.integers(3, 40), st.integers(1, 700), st.floats(0.01, 1), st.booleans())
def test_budgets_are_met_closely(layers: int, total: int, budget: float, faithful: bool) -> None:
    shape = Shape(layers, total)
    try:
        bound = DART(budget=budget, faithful=faithful).bind(shape)
    except BudgetError:
        assert (total + layers - 1) / layers > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert spent <= budget * total + 1e-6
    loss = 1 + (8 if faithful else 0)
    if bound.options.keep != 1:
        assert spent > budget * total - loss - 1e-6


def test_budgets_lower_layer_and_pivots_only_where_they_must_and_may() -> None:
    shape = Shape(12, 256)
    assert DART(budget=0.35).bind(shape).options.layer == 2
    low = DART(budget=0.15).bind(shape).options
    assert (low.layer, low.keep, low.image_pivots) == (1, 18, 4)
    lower = DART(budget=0.091).bind(shape).options
    assert (lower.layer, lower.keep, lower.image_pivots) == (1, 2, 2)
    with pytest.raises(BudgetError, match=r"'dart' cannot meet budget 0\.091 on 12 layers"):
        DART(budget=0.091, image_pivots=4).bind(shape)
    with pytest.raises(BudgetError, match=r"'dart' cannot meet budget 0\.15"):
        DART(budget=0.15, layer=2).bind(shape)
    with pytest.raises(BudgetError, match="keeps at least its 4 image pivots; found keep=3 of 256"):
        list(DART(keep=3).stages(shape))
    with pytest.raises(OptionError, match="'layer': found 12, but the model has 12 layers"):
        list(DART(layer=12).stages(shape))


def test_published_settings_and_what_they_run() -> None:
    shape = Shape(32, 576)
    runs = [equivalent_tokens(list(DART(keep=m, faithful=True).stages(shape)), shape) for m in (192, 128, 64)]
    assert runs == pytest.approx([219.75, 159.75, 99.75])
