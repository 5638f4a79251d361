"""CSP: exact representatives in every mode, budgets, re-entry, batches; and whole runs through a decoder."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategy_bench import PIXELS, Bench

import tokenprune
from tokenprune.core.options import tokens_of
from tokenprune.core.reads import ClsAttention
from tokenprune.core.scheduling.requirements import declared_reads
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.errors import BudgetError, InputError, OptionError
from tokenprune_strategies.csp.clustering import k_means, sample_instances
from tokenprune_strategies.csp.csp import CSP
from tokenprune_strategies.csp.instance_masks import instance_labels, segment
from tokenprune_strategies.csp.presets import CSP65, CSP70

QUICK = settings(max_examples=30, deadline=None)
IMAGES = st.lists(st.integers(1, 40), min_size=1, max_size=2)
AMOUNTS = st.one_of(st.integers(1, 60), st.floats(0.01, 1))


def two_halves(image: Any) -> Any:
    """Overlapping masks, an empty one, and a bit that nobody covers."""
    masks = np.zeros((3, PIXELS, PIXELS), dtype=bool)
    masks[0, :, : PIXELS // 2] = True
    masks[1, : PIXELS // 2] = True
    return masks


MODES = [
    {"clustering": "uniform"},
    {"clustering": "grid"},
    {"clustering": "random", "seed": 5},
    {"clustering": "cls_attention"},
    {"clustering": "kmeans"},
    {"clustering": "seg_first", "regions": 3},
    {"clustering": "seg_first", "segmenter": two_halves},
]
MODE_NAMES = [mode["clustering"] + ("+masks" if "segmenter" in mode else "") for mode in MODES]


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
@settings(max_examples=12, deadline=None)
@given(st.lists(IMAGES, min_size=1, max_size=3), AMOUNTS, AMOUNTS, st.sampled_from(["projected", "delta"]))
def test_exact_numbers_and_a_row_is_itself_in_a_batch(
    mode: dict[str, Any], rows: list[list[int]], few: int | float, keep: int | float, reentry: str
) -> None:
    rows = [
        images if len(images) == len(rows[0]) or "segmenter" not in mode else [16] * len(rows[0]) for images in rows
    ]
    if "segmenter" in mode:
        rows = [images[:1] for images in rows]
    strategy = CSP(**mode, representatives=few, keep=keep, reentry=reentry)
    together = Bench(strategy, rows).run()
    again = Bench(strategy, rows).run()
    for stage, repeated in zip(together.trace.stages, again.trace.stages, strict=True):
        assert torch.equal(stage.active, repeated.active)
    for row, images in enumerate(rows):
        total = sum(images)
        alone = Bench(strategy, [images], seeds=[row]).run()
        sizes = [tokens_of(few, total), total, tokens_of(keep, total)]
        assert [len(stage.kept[row]) for stage in together.trace.stages] == sizes
        for stage, own in zip(together.trace.stages, alone.trace.stages, strict=True):
            assert stage.kept[row] == own.kept[0]
        torch.testing.assert_close(together.states[row, :total], alone.states[0, :total])


def test_uniform_is_the_published_stride() -> None:
    kept = Bench(CSP(clustering="uniform", representatives=64), [[256], [256]]).run().trace.stages[0].kept
    assert kept == [list(range(0, 256, 4))] * 2
    kept = Bench(CSP(clustering="uniform", representatives=100), [[256]]).run().trace.stages[0].kept[0]
    assert kept == [i * (256 // 100) for i in range(100)]


def test_cls_attention_takes_the_most_attended() -> None:
    bench = Bench(CSP(clustering="cls_attention", representatives=9), [[49]])
    expected = bench.drawn("cls_attention").softmax(1)[0].topk(9).indices.sort().values.tolist()
    assert bench.run().trace.stages[0].kept[0] == expected


def test_as_published_cls_attention_is_one_softmax_at_full_width() -> None:
    assert ClsAttention(heads="joint") in declared_reads(CSP(clustering="cls_attention", faithful=True), Shape(12, 64))
    assert ClsAttention() in declared_reads(CSP(clustering="cls_attention"), Shape(12, 64))


@QUICK
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 60))
def test_as_published_each_instance_gets_its_share_rounded_down_or_one(labels: list[int], count: int) -> None:
    count = min(count, len(labels))
    picked = sample_instances(torch.tensor(labels), count, published=True).tolist()
    for label in set(labels):
        share = Fraction(count * labels.count(label), len(labels))
        assert sum(labels[token] == label for token in picked) == max(1, floor(share))


@pytest.mark.parametrize("images", [[64], [36, 64]])
def test_as_published_the_number_of_representatives_varies_and_no_budget_is_met(images: list[int]) -> None:
    strategy = CSP(clustering="seg_first", regions=5, representatives=10, faithful=True)
    stages = Bench(strategy, [images]).run().trace.stages
    assert len(images) * 1 <= len(stages[0].kept[0]) <= 10 + 5 * len(images)
    assert len(stages[1].kept[0]) == sum(images)
    with pytest.raises(BudgetError, match=r"'csp' cannot meet budget 0\.35: stage 'cluster' keeps a number of tokens"):
        CSP(clustering="seg_first", faithful=True, budget=0.35).bind(Shape(12, 64))
    with pytest.raises(OptionError, match="'faithful' has no effect with clustering=grid"):
        tokenprune.strategy("csp", faithful=True)


def test_kept_are_the_most_attended_at_the_prune_layer() -> None:
    bench = Bench(CSP(keep=7), [[64]])
    expected = bench.drawn("attention")[0].topk(7).indices.sort().values.tolist()
    stages = bench.run().trace.stages
    assert [(stage.name, stage.layer, stage.kind) for stage in stages] == [
        ("cluster", 0, "park"),
        ("scatter", 3, "restore"),
        ("prune", 6, "keep"),
    ]
    assert stages[2].kept[0] == expected


@QUICK
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 70))
def test_instances_give_exactly_what_is_asked(labels: list[int], count: int) -> None:
    picked = sample_instances(torch.tensor(labels), count).tolist()
    assert picked == sorted(set(picked))
    assert len(picked) == min(count, len(labels))
    if count >= len(set(labels)):
        assert {labels[token] for token in picked} == set(labels)


def test_instances_by_area_as_published() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 4)
    picked = labels[sample_instances(labels, 16)]
    assert [(picked == label).sum().item() for label in range(3)] == [10, 5, 1]


@QUICK
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 100))
def test_any_masks_label_every_token(instances: int, rows: int, columns: int, seed: int) -> None:
    masks = torch.rand(instances, 30, 20, generator=torch.Generator().manual_seed(seed)) > 0.4
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    labels = instance_labels(masks, cells, (rows, columns))
    assert labels.shape == (rows * columns,)
    assert labels.min() >= 0
    assert labels.max() <= instances


def test_labels_follow_the_mask_that_covers_most() -> None:
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, :20] = True
    masks[1, :12, :20] = True
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    labels = instance_labels(masks, torch.cat((cells, torch.tensor([[-1, -1]]))), (4, 4))
    assert labels.tolist() == [1] * 8 + [0] * 8 + [0]


def test_k_means_of_repeated_features_still_gives_enough() -> None:
    labels, picked = k_means(torch.zeros(20, 3), 6, seed=0)
    assert len(labels) == 20
    assert len(set(picked.tolist())) == 6
    features = torch.eye(3).repeat_interleave(5, 0) * 10 + torch.randn(15, 3) * 0.01
    labels, picked = k_means(features, 3, seed=0)
    assert sorted(p // 5 for p in picked.tolist()) == [0, 1, 2]
    assert labels[picked].unique().tolist() == [0, 1, 2]


def test_delta_adds_what_the_nearest_representative_gained() -> None:
    bench = Bench(CSP(clustering="uniform", representatives=4, reentry="delta"), [[16]])
    for layer in range(4):
        bench.enter(layer)
        if layer == 3:
            break
        moved = bench.states + bench.drawn(f"layer{layer}", 6)
        bench.states = torch.where(bench.state.active[..., None], moved, bench.states)
    gained = bench.states - bench.embeddings
    # 4 x 4 grid, representatives 0, 4, 8, 12 are its first column: every token moves as the first of its grid row
    for token in range(16):
        torch.testing.assert_close(gained[0, token], gained[0, token // 4 * 4], atol=1e-5, rtol=1e-5)
    assert gained[0, ::4].abs().min() > 0


def test_projected_comes_back_as_parked() -> None:
    bench = Bench(CSP(clustering="uniform", representatives=4), [[16]])
    for layer in range(4):
        bench.enter(layer)
    parked = [token for token in range(16) if token % 4]
    assert torch.equal(bench.states[0, parked], bench.embeddings[0, parked])
    assert bench.state.active.all()


@QUICK
@given(
    st.integers(3, 60), st.integers(1, 700), st.floats(0.01, 1), st.sampled_from([{}, {"keep": 3}, {"scatter_at": 0.4}])
)
@example(3, 1, 1.0, {"keep": 3})  # more than there are
def test_budgets_are_met_closely(layers: int, total: int, budget: float, options: dict[str, Any]) -> None:
    shape, strategy = Shape(layers, total), CSP(budget=budget, **options)
    try:
        bound = strategy.bind(shape)
    except BudgetError:
        scatter_at, prune_at = CSP(**options).boundaries(layers)
        least = min(
            (s + (p - s) * total + (layers - p) * min(options.get("keep", 1), total)) / layers
            for s in range(scatter_at, prune_at)
            for p in range(s + 1, prune_at + 1)
            if ("scatter_at" in options and s == scatter_at) or ("scatter_at" not in options and p == prune_at)
        )
        assert least > budget * total
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert spent <= budget * total + 1e-6
    if "keep" not in options:
        assert spent > budget * total - 1
    assert bound.options.model_fields_set >= set(options)
    assert min(options.get("keep", bound.options.keep), total) == bound.options.keep


@QUICK
@given(st.floats(0.15, 1), st.floats(0.15, 1), st.sampled_from([(12, 256), (32, 576)]))
def test_more_budget_is_spent_on_more(one: float, other: float, sizes: tuple[int, int]) -> None:
    shape, spent = Shape(*sizes), []
    for budget in sorted((one, other)):
        spent.append(equivalent_tokens(list(CSP(budget=budget).bind(shape).stages(shape)), shape))
    assert spent[0] <= spent[1] + 1


@pytest.mark.parametrize(
    ("layers", "boundaries"), [(3, (1, 2)), (4, (1, 2)), (12, (3, 6)), (32, (8, 16)), (40, (10, 20))]
)
def test_boundaries_carry_to_other_depths(layers: int, boundaries: tuple[int, int]) -> None:
    assert CSP().boundaries(layers) == boundaries


def test_the_published_proportions() -> None:
    shape = Shape(32, 576)
    assert equivalent_tokens(list(CSP().stages(shape)), shape) / 576 == pytest.approx(0.34375)
    for kind, share in ((CSP65, 0.35), (CSP70, 0.30)):
        bound = kind().bind(shape)
        assert isinstance(bound, CSP)
        assert bound.budget is None
        assert share - 0.002 < equivalent_tokens(list(bound.stages(shape)), shape) / 576 <= share
        assert bound.boundaries(32) == (8, 16)
    assert kind(budget=0.5).budget == 0.5
    small = CSP(budget=0.15).bind(Shape(12, 256))
    assert small.boundaries(12) == (5, 6)


def test_a_budget_that_cannot_be_met_is_named() -> None:
    with pytest.raises(
        BudgetError, match=r"'csp' cannot meet budget 0\.05 on 12 layers .* the smallest possible budget is 0\.087"
    ):
        CSP(budget=0.05).bind(Shape(12, 256))
    with pytest.raises(BudgetError):
        CSP(budget=0.3, representatives=0.9, keep=0.9).bind(Shape(12, 256))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"clustering": "unifrom"}, "clustering"),
        ({"reentry": "again"}, "reentry"),
        ({"representatives": 0.0}, "representatives"),
        ({"keep": 0}, "keep"),
        ({"scatter_at": 0}, "scatter_at"),
        ({"prune_at": 1.0}, "prune_at"),
        ({"regions": 0}, "regions"),
        ({"represent": 1}, "did you mean 'representatives'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        tokenprune.strategy("csp", **options)


def test_layers_that_do_not_fit_the_model_are_named() -> None:
    with pytest.raises(OptionError, match="expected 0 < scatter_at < prune_at < 12"):
        CSP(scatter_at=6, prune_at=6).boundaries(12)
    with pytest.raises(OptionError, match="scatter_at"):
        CSP().boundaries(2)


def test_bad_segmenters_are_named(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=r"'<lambda>': found masks of shape \[3, 3\]"):
        segment(lambda _: np.zeros((3, 3)), image)
    with pytest.raises(OptionError, match=r"not an installed segmenter \(none\) and cannot be loaded for"):
        segment(str(tmp_path), image)


def test_a_transformers_checkpoint_segments(tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=3,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    try:
        processor = SegformerImageProcessor(size={"height": 64, "width": 64})
    except ImportError as error:  # some releases of transformers
        pytest.skip(f"SegFormer's image processor cannot be made here: {error}")
    processor.save_pretrained(tmp_path)
    masks = segment(str(tmp_path), np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8))
    assert masks.dtype == torch.bool
    assert masks.shape[1:] == (48, 40)
    assert masks.any(0).all()


def test_options_can_be_told_without_the_function() -> None:
    told = CSP(clustering="seg_first", segmenter=two_halves).options.model_dump(mode="json")
    assert told["segmenter"] == "two_halves"


@pytest.mark.parametrize("options", [{}, {"reentry": "delta"}, {"clustering": "random"}], ids=str)
def test_through_a_decoder(options: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4
    )
    llama = LlamaForCausalLM(config).eval()
    embeddings = torch.randn(2, 30, 32)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, 3:19] = True
    with torch.no_grad(), tokenprune.prune(llama, CSP(**options), image_tokens=mask) as run:
        logits = llama(inputs_embeds=embeddings, use_cache=False).logits
    assert logits.shape == (2, 30, 50)
    assert [entry.image for entry in run.trace.ledger.entries] == [(4, 4)] * 2 + [(16, 16)] * 2 + [(1, 1)] * 4
    with torch.no_grad(), tokenprune.prune(llama, CSP(**options), image_tokens=mask[1:]) as run:
        alone = llama(inputs_embeds=embeddings[1:], use_cache=False).logits
    text = ~mask[1]
    torch.testing.assert_close(logits[1:, text], alone[:, text], atol=1e-5, rtol=1e-4)
