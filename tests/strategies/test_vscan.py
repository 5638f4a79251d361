"""VScan against the reference runs of the authors' towers and decoder, and what holds for any input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Reference, run
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import WIDTH, Bench
from torch import Tensor, nn
from torch.nn.functional import normalize

import tokenprune
from tokenprune.core.options import tokens_of
from tokenprune.core.reads import ClsAttention, Crops, Embeddings, Read, ReceivedAttention
from tokenprune.core.scheduling.requirements import check_fit
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.errors import BudgetError, IncompatibleError, InputError, OptionError
from tokenprune.testing.kit import invariants
from tokenprune.testing.kit.cases import Case, Row
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.vscan.scans import Windows, best_of_rest, merge_weights
from tokenprune_strategies.vscan.vscan import VScan

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 50), min_size=1, max_size=3)
KEEP = st.lists(st.floats(0.02, 1), min_size=2, max_size=2).map(lambda found: tuple(sorted(found, reverse=True)))
VARIANTS = st.sampled_from(["llava", "qwen"])
SIDE, CPU = 24, torch.device("cpu")


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("vscan"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


def theirs(chosen: dict[str, Any], *, faithful: bool = True) -> VScan:
    """The options that a setting of the authors' means."""
    keep = (chosen["visual_token_num"] if faithful else chosen["kept_patches"], *chosen["image_token_list"])
    return VScan(keep=keep, layers=chosen["layer_list"], shallow=5, faithful=faithful)


def cells_of(rows: int, columns: int) -> Tensor:
    """int64 [rows · columns, 2]."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)


def scanned(
    strategy: VScan, grid: Tensor, local: Tensor, everywhere: Tensor, rows: Tensor, **options: Any
) -> tuple[list[list[int]], Tensor]:
    """Kept tokens and their states, of one image of these cells [n, 2] in every batch row.

    Args:
        strategy: with an explicit variant.
        grid: int64 [n, 2].
        local, everywhere: float32 [batch, n], attention of both tower layers.
        rows: float32 [batch, n, width], projected.
        options: further arguments of `Bench`.
    """
    bench = Bench(strategy, [[len(grid)]] * len(rows), **options)
    cells = torch.full((*bench.layout.valid.shape, 2), -1)
    cells[bench.layout.image_tokens] = grid.repeat(len(rows), 1)
    bench.layout, bench.states = replace(bench.layout, grid=cells), rows
    shallow, deep, *_ = bench.planned[0].stage.reads
    values = {shallow: local, deep: everywhere, Embeddings(): rows}
    provide = bench.provide
    bench.provide = lambda read: values[read] if read in values else provide(read)  # type: ignore[method-assign]
    bench.enter(0)
    return bench.trace.stages[0].kept, bench.states


# reference data: LLaVA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_golden_scans_and_merge(setting: int, case: Reference) -> None:
    chosen, tensors, name = case.about["settings"][setting], case.tensors, f"setting{setting}"
    half = chosen["visual_token_num"] // 2
    windows = Windows.of(cells_of(SIDE, SIDE), CPU, fixed_size=False)
    assert len(windows) == 16
    for row in range(2):
        local = windows.best(tensors["cls_attention_shallow"][row], half, half // 16)
        assert sorted(local.tolist()) == sorted(tensors[f"{name}.local_indices"][row].tolist())
        deep, count = tensors["cls_attention_deep"][row], chosen["visual_token_num"] - half
        best = best_of_rest(deep, local, count)
        assert torch.equal(best, tensors[f"{name}.global_indices"][row])
        kept, rows = tensors[f"{name}.kept_patches"][row], tensors["projected"][row]
        weights = merge_weights(rows, kept)
        assert torch.equal(weights[:, kept] > 0, torch.eye(len(kept)).bool())  # kept tokens stay apart
        others = [token for token in range(SIDE**2) if token not in kept.tolist()]
        assert torch.equal(weights[:, others].argmax(0), tensors[f"{name}.nearest"][row])
        torch.testing.assert_close(weights @ rows, tensors[f"{name}.merged"][row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("setting", [0, 1, 2])
def test_golden_choice_in_the_tower(setting: int, faithful: bool, case: Reference) -> None:
    """The right form gives to the global scan what the authors lose: it keeps what they keep, and more."""
    chosen, tensors, name = case.about["settings"][setting], case.tensors, f"setting{setting}"
    count = chosen["visual_token_num"]
    strategy = VScan(keep=(count, 9), variant="llava", faithful=faithful)
    seen = (tensors[f"cls_attention_{which}"] for which in ("shallow", "deep"))
    found, states = scanned(strategy, cells_of(SIDE, SIDE), *seen, tensors["projected"])
    for row, kept in enumerate(tensors[f"{name}.kept_patches"]):
        if faithful or len(kept) == count:
            assert found[row] == kept.tolist()
            torch.testing.assert_close(states[row, kept], tensors[f"{name}.merged"][row], atol=1e-4, rtol=0)
        else:
            assert len(found[row]) == count
            assert {*found[row]} > {*kept.tolist()}


def test_golden_tower_is_ours(case: Reference, golden: Callable[[str], Path]) -> None:
    tower = load_tower(golden("vscan") / "clip", torch.float32)
    weights = {n.removeprefix("projector."): t.float() for n, t in case.tensors.items() if n.startswith("projector.")}
    (hidden, channels), width = weights["0.weight"].shape, weights["2.weight"].shape[0]
    projector = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, width))
    projector.load_state_dict(weights)
    for row, pixels in enumerate(case.tensors["pixel_values"].float()):
        with torch.no_grad():
            seen = run_tower(tower, pixels[None])
            projected = projector(seen.features)[0]
        for layer, which in ((5, "shallow"), (-2, "deep")):
            expected = case.tensors[f"cls_attention_{which}"][row]
            torch.testing.assert_close(seen.cls_attention(layer)[0], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(projected, case.tensors["projected"][row], atol=1e-4, rtol=0)


# the right form of the third keeps more patches
@pytest.mark.parametrize(("setting", "faithful"), [(0, True), (1, True), (2, True), (0, False), (1, False)])
def test_golden_whole_run(setting: int, faithful: bool, llama: Any, case: Reference) -> None:
    chosen, tensors, name = case.about["settings"][setting], case.tensors, f"setting{setting}"
    image, first, text = chosen["image"], case.about["PRE"], tensors["text_embeds"]
    mask = torch.zeros(1, text.shape[1] + SIDE**2, dtype=torch.bool)
    mask[:, first : first + SIDE**2] = True
    layers = {5: "shallow", case.about["deep_layer"]: "deep"}
    vision = VisionSource(
        {ClsAttention: lambda read: tensors[f"cls_attention_{layers[read.layer]}"][image, None]},
        case.about["clip"]["layers"],
    )
    whole = torch.cat((text[:, :first], tensors["projected"][image, None], text[:, first:]), 1)
    fed = tensors[f"{name}.decode_token_ids"].tolist()
    found = run(llama, theirs(chosen, faithful=faithful), whole, mask, fed, vision=vision)
    scan, *drops = found.trace.stages
    patches = before = tensors[f"{name}.kept_patches"][image]
    assert scan.kept[0] == patches.tolist()
    for number, stage in enumerate(drops):
        assert stage.scores is not None
        expected = tensors[f"{name}.stage{number}.scores"]
        torch.testing.assert_close(stage.scores[0, before], expected, atol=1e-6, rtol=0)
        before = patches[tensors[f"{name}.stage{number}.kept_image"]]
        assert stage.kept[0] == before.tolist()
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert lengths == chosen["layer_input_lengths"]
    assert found.kv_lengths == chosen["kv_lengths_after_decode"]
    torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits[:, found.rows()], tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.decoded, tensors[f"{name}.decode_logits"], atol=1e-4, rtol=0)


# reference data: Qwen2.5-VL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_golden_windows_of_grids_that_are_not_square(number: int, faithful: bool, case: Reference) -> None:
    chosen, tensors, name = case.about["qwen"]["selection"][number], case.tensors, f"qwen.sel{number}"
    grid, rows = cells_of(*chosen["grid"]), tensors[f"{name}.features"]
    shallow, deep = tensors[f"{name}.attention_local"], tensors[f"{name}.attention_global"]
    windows = Windows.of(grid, CPU, fixed_size=True)
    assert len(windows) == chosen["windows"]
    local = windows.best(shallow, chosen["keep"] // 2, chosen["limit_per_window"])
    assert torch.equal(local, tensors[f"{name}.local"])
    best = best_of_rest(deep, local, chosen["keep"] - len(local))
    assert torch.equal(best, tensors[f"{name}.global"])
    strategy = VScan(keep=(chosen["ratio"], 3), variant="qwen", faithful=faithful)
    kept, states = scanned(strategy, grid, shallow[None], deep[None], rows[None])
    assert kept[0] == tensors[f"{name}.kept"].tolist()
    torch.testing.assert_close(states[0, kept[0]], tensors[f"{name}.merged"], atol=1e-4, rtol=0)


def qwen_layer(case: Reference, attention: str) -> Any:
    """A decoder of two layers: one that changes nothing, and the reference data's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    about, stored = case.about["qwen"]["layer"], "qwen.layer."
    config = Qwen2Config(
        hidden_size=case.tensors["qwen.layer.states"].shape[-1],
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=about["heads"],
        num_key_value_heads=about["kv_heads"],
        rms_norm_eps=about["eps"],
        vocab_size=16,
        attn_implementation=attention,
    )
    model = Qwen2ForCausalLM(config).eval()
    nothing, layer = model.model.layers
    nothing.self_attn.o_proj.weight.data.zero_()
    nothing.mlp.down_proj.weight.data.zero_()
    weights = {name.removeprefix(stored): t for name, t in case.tensors.items() if name.startswith(stored)}
    known = {name: weights[name] for name in layer.state_dict() if name in weights}
    assert len(known) == 5
    layer.load_state_dict(known, strict=False)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_score_without_rotation(attention: str, case: Reference) -> None:
    about, tensors = case.about["qwen"]["layer"], case.tensors
    first, images, states = about["PRE"], about["IMG"], tensors["qwen.layer.states"]
    mask = torch.zeros(1, states.shape[1], dtype=torch.bool)
    mask[:, first : first + images] = True
    grid = torch.full((1, states.shape[1], 2), -1)
    grid[mask] = cells_of(9, 14)
    vision = VisionSource({ReceivedAttention: lambda read: torch.rand(1, images)}, 32)
    strategy = VScan(keep=(images, about["keep"]), layers=(1,), faithful=True)  # the tower keeps every token
    found = run(qwen_layer(case, attention), strategy, states, mask, grid=grid, vision=vision)
    stage = found.trace.stages[1]
    assert stage.scores is not None
    torch.testing.assert_close(stage.scores[0], tensors["qwen.layer.scores"], atol=1e-6, rtol=0)
    assert found.rows() == tensors["qwen.layer.kept_rows"].tolist()


# any input ------------------------------------------------------------------------------------------------------------


def slow_walk(attention: list[float], window: list[int], count: int, room: int) -> list[int]:
    """Walk through all tokens by falling attention, and take one if its window has room."""
    taken: list[int] = []
    for token in sorted(range(len(attention)), key=lambda token: -attention[token]):
        if len(taken) < count and sum(window[other] == window[token] for other in taken) < room:
            taken.append(token)
    return taken


@QUICK
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99), st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_windows_are_those_of_the_slow_form(
    rows: int, columns: int, seed: int, count: int, room: int, fixed: bool
) -> None:
    grid = cells_of(rows, columns)
    windows = Windows.of(grid + torch.tensor([2, 5]), CPU, fixed_size=fixed)  # a crop need not begin at (0, 0)
    if fixed:
        high, wide = max(1, rows // 4), max(1, columns // 4)
        own = [min(y // 4, high - 1) * wide + min(x // 4, wide - 1) for y, x in grid.tolist()]
    else:
        high, wide = min(4, rows), min(4, columns)
        own = [y * high // rows * wide + x * wide // columns for y, x in grid.tolist()]
    assert len(windows) == high * wide
    assert windows.number.tolist() == own
    assert windows.sizes.tolist() == [own.count(number) for number in range(high * wide)]
    attention = torch.rand(rows * columns, generator=torch.Generator().manual_seed(seed))
    assert windows.best(attention, count, room).tolist() == slow_walk(attention.tolist(), own, count, room)


def test_without_cells_windows_are_runs_of_the_sequence() -> None:
    none = torch.full((50, 2), -1)
    assert Windows.of(none, CPU, fixed_size=True).sizes.tolist() == [16, 16, 18]
    assert Windows.of(none, CPU, fixed_size=False).sizes.tolist() == [4, 3, 3, 3, 3, 3, 3, 3] * 2
    assert Windows.of(none[:3], CPU, fixed_size=False).sizes.tolist() == [1, 1, 1]


@QUICK
@given(st.integers(1, 40), st.integers(0, 99), st.floats(0, 1))
def test_every_token_goes_to_the_kept_one_that_is_most_like_it(size: int, seed: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 5, generator=draw)
    kept = torch.randperm(size, generator=draw)[: max(1, int(share * size))].sort().values
    unit = normalize(rows.double(), dim=-1)
    merged = {token: [token] for token in kept.tolist()}
    for token in range(size):
        if token not in merged:
            likeness = (unit[kept] @ unit[token]).tolist()
            merged[int(kept[likeness.index(max(likeness))])].append(token)
    expected = torch.stack([rows[members].mean(0) for members in merged.values()])
    torch.testing.assert_close(merge_weights(rows, kept) @ rows, expected, atol=1e-5, rtol=0)


@QUICK
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.floats(0.02, 1), VARIANTS)
def test_half_of_the_tokens_are_from_windows_of_any_grid(
    rows: int, columns: int, seed: int, share: float, variant: Any
) -> None:
    size = rows * columns
    draw = torch.Generator().manual_seed(seed)
    local, everywhere = torch.rand(1, size, generator=draw), torch.rand(1, size, generator=draw)
    states = torch.randn(1, size, WIDTH, generator=draw)
    grid, count = cells_of(rows, columns), tokens_of(share, size)
    ((kept,), _) = scanned(VScan(keep=(count, 1), variant=variant), grid, local, everywhere, states)
    windows = Windows.of(grid, CPU, fixed_size=variant == "qwen")
    room = -(-(count // 2) // len(windows)) if variant == "qwen" else count // 2 // len(windows)
    chosen = slow_walk(local[0].tolist(), windows.number.tolist(), count // 2, room)
    rest = sorted({*range(size)} - {*chosen}, key=lambda token: -float(everywhere[0, token]))
    assert kept == sorted(chosen + rest[: count - len(chosen)])


@QUICK
@given(IMAGES, KEEP, VARIANTS, st.sampled_from([None, "renumber", "keep"]))
def test_numbers_are_exact_and_a_row_is_itself_in_a_batch(
    images: list[int], keep: tuple[float, ...], variant: Any, positions: Any
) -> None:
    rows = [images, [17] * len(images), [36]]
    strategy = VScan(keep=keep, variant=variant, positions=positions)
    together = Bench(strategy, rows).run()
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        for number, amount in enumerate(keep):
            kept = together.trace.stages[number].kept[row]
            assert len(kept) == tokens_of(amount, sum(own))
            assert kept == alone.trace.stages[number].kept[0]
        torch.testing.assert_close(together.states[row, kept], alone.states[0, kept], atol=1e-5, rtol=1e-5)
    wanted = positions or ("renumber" if variant == "llava" else "keep")
    assert together.trace.policies["positions"] == wanted


def test_crops_share_the_tokens_by_size() -> None:
    crops = torch.tensor([[0] * 20 + [1] * 20 + [2] * 40])
    bench = Bench(VScan(keep=(20, 5)), [[40, 40]], given={"crops": crops})
    bench.enter(0)
    assert crops[0, bench.trace.stages[0].kept[0]].bincount().tolist() == [5, 5, 10]


def test_without_crops_an_image_is_one() -> None:
    bench = Bench(VScan(keep=(10, 5)), [[30]], readable=set(Read.__subclasses__()) - {Crops}).run()
    assert [len(stage.kept[0]) for stage in bench.trace.stages] == [10, 5]


def test_the_variant_is_that_of_the_tower() -> None:
    def reads(shape: Shape, **options: Any) -> tuple[Read, ...]:
        return next(iter(VScan(**options).stages(shape))).reads[:2]

    every = frozenset(Read.__subclasses__())
    with_cls, without = (Shape(28, 96, 9, 32, some) for some in (every, every - {ClsAttention}))
    assert reads(with_cls) == (ClsAttention(7), ClsAttention(-2))
    assert reads(without) == (ReceivedAttention(7), ReceivedAttention(-1))
    assert reads(with_cls, variant="qwen") == reads(without)
    assert (
        reads(replace(with_cls, tower_layers=24))[0] == reads(replace(with_cls, tower_layers=0))[0] == ClsAttention(5)
    )
    assert reads(with_cls, shallow=3)[0] == ClsAttention(3)
    with pytest.raises(IncompatibleError, match="requires ClsAttention"):
        Bench(VScan(variant="llava"), [[30]], readable=every - {ClsAttention})


@pytest.mark.parametrize(
    ("options", "received", "runs"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"positions": "keep"}, False, True),
        ({"positions": "renumber"}, True, False),
        ({"variant": "qwen"}, False, True),
    ],
)
def test_positions_of_three_axes_are_not_renumbered(options: dict[str, Any], received: bool, runs: bool) -> None:
    """By default what renumbers depends on the tower, and only what does is refused."""
    every = frozenset(Read.__subclasses__())
    shape = Shape(8, 96, 9, 32, every - {ClsAttention} if received else every)
    if runs:
        check_fit(VScan(**options), "m", shape, multimodal_rope=True)
        return
    with pytest.raises(IncompatibleError, match=r"it renumbers positions, .*; use positions='keep'"):
        check_fit(VScan(**options), "m", shape, multimodal_rope=True)


@pytest.mark.parametrize(
    ("rows", "variant", "found"),
    [
        ([[24 * 23]], "llava", "552 tokens"),
        ([[25], [576]], "llava", "a grid of 5 x 5"),
        ([[576, 576]], "llava", "2 images or crops"),
        ([[36, 36]], "qwen", "2 images or crops"),
        ([[9]], "qwen", "a grid of 3 x 3"),
    ],
)
def test_what_their_code_cannot_process_is_refused(rows: list[list[int]], variant: Any, found: str) -> None:
    with pytest.raises(OptionError, match=f"the authors' code processes one image of .* has {found}"):
        Bench(VScan(faithful=True, variant=variant), rows).enter(0)


def test_numbers_that_the_windows_do_not_divide_are_lost_only_where_faithful() -> None:
    for count, left in ((96, 96), (40, 36), (57, 45), (576, 576)):
        for faithful, variant, expected in ((True, "llava", left), (True, "qwen", count), (False, "llava", count)):
            strategy = VScan(keep=(count, 38), variant=variant, faithful=faithful)
            stages = list(strategy.stages(Shape(32, 576)))
            assert [stage.tokens for stage in stages] == [expected, min(38, expected)]


@pytest.mark.parametrize("family", ["mrope", "llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_variant_of_qwen_is_what_masks_define(family: str, padding: str) -> None:
    """The conformance kit's towers have a [CLS], so that it runs the other variant."""
    rows = Row(((2, 3),), 1, 2, 10), Row(((6, 6), (1, 2)), 2, 3, 21)
    case, strategy = Case(family, rows, padding, 0.5), VScan(variant="qwen", layers=(3,))
    for invariant in (
        invariants.equals_oracle,
        invariants.row_equals_row_alone,
        invariants.cached_equals_recomputed,
        invariants.keep_all_is_the_baseline,
    ):
        invariant(case, strategy)


def test_published_settings() -> None:
    stages = list(VScan().stages(Shape(32, 576)))
    assert [(stage.layer, stage.tokens) for stage in stages] == [(0, 96), (16, 32)]
    bound = VScan(budget=64 / 576).bind(Shape(32, 576))
    assert (bound.options.layers, bound.options.keep) == ((16,), (96, 32))
    assert VScan(budget=1.0).bind(Shape(32, 576)).options.keep == (576, 576)


@QUICK
@given(st.integers(2, 40), st.integers(1, 700), st.floats(0.01, 1), VARIANTS)
def test_budgets_are_met_closely(layers: int, total: int, budget: float, variant: Any) -> None:
    shape = Shape(layers, total)
    try:
        bound = VScan(budget=budget, variant=variant).bind(shape)
    except BudgetError:
        assert budget * total < 1
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_what_the_user_set_stays() -> None:
    shape = Shape(32, 576)
    assert VScan(budget=0.5, keep=(200, 100)).bind(shape).options.keep == (200, 100)
    assert VScan(budget=0.3, layers=(8,)).bind(shape).options.layers == (8,)
    lower = VScan(budget=0.2, keep=(200, 50)).bind(shape).options
    assert (lower.layers, lower.keep) == ((13,), (200, 50))


@pytest.mark.parametrize("field", ["cls_attention", "attention"])
def test_nan_is_refused(field: str) -> None:
    bench = Bench(VScan(keep=(1.0, 5), variant="llava"), [[30]])
    bench.given[field] = bench.drawn(field).masked_fill(torch.arange(30) == 3, float("nan"))
    with pytest.raises(InputError, match=rf"'vscan', stage '.*': NaN.* in tokens\.{field} .*image token 3 of"):
        bench.run()


@pytest.mark.parametrize(
    "bad",
    [{"keep": (0, 1)}, {"keep": (9,)}, {"layers": ()}, {"variant": "x"}, {"shallow": 1.5}, {"positions": "move"}],
)
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("vscan", **bad)


def test_options_that_do_not_match_are_refused() -> None:
    with pytest.raises(OptionError, match="'keep' and 'layers': found 2 and 2 values"):
        VScan(layers=(0.25, 0.5))
    with pytest.raises(OptionError, match=r"would keep \[10, 20\] image tokens"):
        list(VScan(keep=(10, 20)).stages(Shape(12, 30)))
    with pytest.raises(OptionError, match="'query' has no effect"):
        tokenprune.strategy("vscan", faithful=True, query="seg")
