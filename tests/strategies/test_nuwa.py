"""Nüwa against the reference data, against a slow form of its own, and what holds for any tokens."""

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
from strategy_bench import CHANNELS, WIDTH, Bench
from torch import Tensor, nn

import tokenprune
from tokenprune.core.decisions import Merge
from tokenprune.core.options import tokens_of
from tokenprune.core.reads import AttentionFrom, ClsAttention, Projector, Read, TowerFeatures, TowerStates
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.errors import BudgetError, IncompatibleError, InputError, OptionError
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import TowerRun, run_tower
from tokenprune_strategies.nuwa.merging import Regions, anchors_of
from tokenprune_strategies.nuwa.nuwa import Nuwa

QUICK = settings(max_examples=40, deadline=None)
GRIDS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3)
AMOUNTS = st.one_of(st.integers(1, 60), st.floats(0.01, 1))
OTHERS = ["fake0", "grid0", "grid1"]


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("nuwa"))


@pytest.fixture(scope="module")
def towers(case: Reference, golden: Callable[[str], Path]) -> list[list[TowerRun]]:
    """The authors' tower on the images of both settings, run here."""
    tower = load_tower(golden("nuwa") / "clip", torch.float32)
    with torch.no_grad():
        return [
            [run_tower(tower, pixels[None]) for pixels in case.tensors[f"tower{number}.pixel_values"].float()]
            for number in range(2)
        ]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


def reads_of(run: TowerRun) -> dict[str, Any]:
    given = {"cls_attention": run.cls_attention(-2), "features": run.features}
    return {**given, "tower_states": run.mean_state(TowerStates(2 / 3, -1)), "project": lambda rows: rows}


def decided(strategy: Nuwa, reads: dict[str, Any], grid: tuple[int, int]) -> Merge:
    """What the strategy answers at its first stage; every row has one image of that grid."""
    rows = len(reads["features"])
    bench = Bench(strategy, [[math.prod(grid)]] * rows, given=reads, grids=[[grid]] * rows)
    planned = bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    assert isinstance(answer, Merge)
    return answer


def check_answer(answer: Merge, case: Reference, name: str, row: int, own: int = 0) -> None:
    """Anchors, weights and sums of one image."""
    tensors = case.tensors
    assert torch.equal(answer.index[own], tensors[f"{name}.kept_patches"][row])
    weights = answer.weights[own]
    torch.testing.assert_close(weights, tensors[f"{name}.weights"][row].float(), atol=1e-3, rtol=0)
    alone = (weights != 0).sum(1) == 1
    high = tensors[f"{name}.high"][row].bool()
    assert bool(alone[high].all())
    assert not bool(alone[~high].all())
    assert answer.values is not None
    torch.testing.assert_close(answer.values[own], tensors[f"{name}.output"][row], atol=1e-4, rtol=0)


def tower_options(case: Reference, number: int) -> dict[str, Any]:
    setting = case.about["tower"][number]
    given = {"per_region": setting["top_per_region"], "distance": setting["distance"]}
    return {"keep": (setting["kept_per_image"], 16), **given}


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize(("number", "row"), [(0, 0), (1, 0), (1, 1)])
def test_golden_merging_through_our_tower(
    number: int, row: int, faithful: bool, case: Reference, towers: list[list[TowerRun]]
) -> None:
    """On 24 × 24 cells the default form is the authors'."""
    reads, name = reads_of(towers[number][row]), f"tower{number}"
    metric = case.tensors[f"{name}.metric"][row]
    torch.testing.assert_close(3 * reads["cls_attention"][0], metric, atol=1e-5, rtol=0)
    states = case.tensors[f"{name}.sim_states"][row].float()
    torch.testing.assert_close(reads["tower_states"][0], states, atol=4e-3, rtol=0)
    answer = decided(Nuwa(**tower_options(case, number), faithful=faithful), reads, (24, 24))
    check_answer(answer, case, name, row)


@pytest.mark.parametrize("number", [0, 1])
def test_golden_candidates(number: int, case: Reference, towers: list[list[TowerRun]]) -> None:
    setting, regions = (
        case.about["tower"][number],
        Regions.of(torch.cartesian_prod(*[torch.arange(24)] * 2), faithful=True),
    )
    each = regions.candidates(setting["kept_per_image"], setting["top_per_region"], faithful=True)
    for row, one in enumerate(towers[number]):
        found = anchors_of(one.cls_attention(-2)[0], regions, each, int(each.sum()))
        assert torch.equal(found, case.tensors[f"tower{number}.candidates"][row].sort().values)


def test_golden_two_images_of_one_prompt(case: Reference, towers: list[list[TowerRun]]) -> None:
    """The authors' batch of two images, whose number of anchors they share."""
    both = [reads_of(one) for one in towers[1]]
    reads = {name: torch.cat([one[name] for one in both], 1) for name in both[0] if name != "project"}
    options = {**tower_options(case, 1), "keep": (224, 32)}
    bench = Bench(Nuwa(**options, faithful=True), [[576, 576]], given={**reads, "project": lambda rows: rows})
    planned = bench.planned[0]
    answer = bench.strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    kept = case.tensors["tower1.kept_patches"]
    assert answer.index[0].tolist() == [*kept[0].tolist(), *(kept[1] + 576).tolist()]
    assert answer.values is not None
    torch.testing.assert_close(answer.values[0], case.tensors["tower1.output"].flatten(0, 1), atol=1e-4, rtol=0)


def stored(case: Reference, name: str) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int]]:
    """Options, reads and grid of a case whose states are given."""
    tensors, setting = case.tensors, case.about[name[:-1]][int(name[-1])]
    height, width = setting["grid"]
    if name.startswith("fake"):
        states = tensors[f"{name}.states"]
        reads = {"features": states[7][:, 1:], "tower_states": states.mean(0)[:, 1:]}
        reads["cls_attention"] = tensors[f"{name}.attention"].mean(1)[:, 1:]
        least, count = setting["top_per_region"], setting["kept_per_image"]
    else:
        reads = {"features": tensors[f"{name}.states"], "tower_states": tensors[f"{name}.sim_states"]}
        reads["cls_attention"] = tensors[f"{name}.metric"]
        least, count = setting["top_asked"], setting["asked"]
    options = {"keep": (count, 1), "per_region": least, "distance": setting["distance"]}
    return options, {**reads, "project": lambda rows: rows}, (height, width)


@pytest.mark.parametrize("name", OTHERS)
def test_golden_merging_on_other_grids(name: str, case: Reference) -> None:
    options, reads, grid = stored(case, name)
    answer = decided(Nuwa(**options, faithful=True), reads, grid)
    for row in range(len(answer.index)):
        check_answer(answer, case, name, row, row)
    candidates = case.tensors[f"{name}.candidates"]
    regions = Regions.of(torch.cartesian_prod(*map(torch.arange, grid)), faithful=True)
    each = regions.candidates(options["keep"][0], options["per_region"], faithful=True)
    for row in range(len(answer.index)):
        found = anchors_of(reads["cls_attention"][row], regions, each, int(each.sum()))
        assert torch.equal(found, candidates[row].sort().values)


@pytest.mark.parametrize("number", [0, 1])
def test_golden_run_from_pixels_to_decoding(
    number: int, llama: Any, case: Reference, towers: list[list[TowerRun]]
) -> None:
    chosen, tensors, name = case.about["llm"][number], case.tensors, f"llm{number}"
    reads, first = reads_of(towers[chosen["tower_setting"]][chosen["image"]]), case.about["PRE"]
    projector = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 48))
    weights = {n.removeprefix("projector."): t.float() for n, t in tensors.items() if n.startswith("projector.")}
    projector.load_state_dict(weights)
    answers = {
        ClsAttention: lambda read: reads["cls_attention"],
        TowerStates: lambda read: reads["tower_states"],
        TowerFeatures: lambda read: reads["features"],
        Projector: lambda read: projector,
    }
    options = {**tower_options(case, chosen["tower_setting"]), "layer": chosen["prune_layer"], "faithful": True}
    strategy = watched(Nuwa)(**{**options, "keep": (chosen["image_rows"], chosen["kept"])})
    text = tensors["text_embeds"]
    embeds = torch.cat((text[:, :first], torch.zeros(1, 576, text.shape[2]), text[:, first:]), 1)
    marks = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    marks[:, first : first + 576] = True
    fed = tensors[f"{name}.decode_token_ids"].tolist()
    found = run(llama, strategy, embeds, marks, fed, vision=VisionSource(answers, layers=24))
    merge, prune = found.trace.stages
    anchors = torch.tensor(merge.kept[0])
    torch.testing.assert_close(strategy.seen[0][2].values, tensors[f"{name}.image_rows"], atol=1e-4, rtol=0)
    assert prune.kept[0] == anchors[tensors[f"{name}.kept_image"]].tolist()
    assert prune.scores is not None
    torch.testing.assert_close(prune.scores[0, anchors], tensors[f"{name}.scores"], atol=1e-6, rtol=0)
    assert tensors[f"{name}.positions_in"][first : first + len(anchors)].tolist() == (anchors + first).tolist()
    assert found.rows() == tensors[f"{name}.kept_positions"].tolist()
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert lengths == chosen["layer_input_lengths"]
    assert found.kv_lengths == [length + len(fed) for length in chosen["kv_lengths_after_prefill"]]
    torch.testing.assert_close(found.logits[:, found.rows()], tensors[f"{name}.logits"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.decoded, tensors[f"{name}.decode_logits"], atol=1e-3, rtol=0)


# for any grid ---------------------------------------------------------------------------------------------------------


def benched(strategy: Nuwa, rows: list[list[tuple[int, int]]], **given: Any) -> Bench:
    return Bench(strategy, [[math.prod(grid) for grid in row] for row in rows], grids=rows, **given)


def slowly(
    attention: list[float], states: Tensor, grid: tuple[int, int], count: int, quantile: float
) -> tuple[list[int], list[list[float]]]:
    """Anchors of one image and their weights, with loops over cells in double precision."""
    height, width = grid
    cells = [(row, column) for row in range(height) for column in range(width)]
    best = sorted(range(len(cells)), key=lambda cell: (-attention[cell], cell))
    for each in range(1, 5):
        given: dict[tuple[int, int], list[int]] = {}
        for cell in best:
            region = given.setdefault((cells[cell][0] // 2, cells[cell][1] // 2), [])
            region += [cell] if len(region) < each else []
        candidates = {cell for region in given.values() for cell in region}
        if len(candidates) >= count:
            break
    anchors = sorted([cell for cell in best if cell in candidates][:count])
    own = sorted(attention[cell] for cell in anchors)
    place = quantile * (count - 1)
    low, share = int(place), place - int(place)
    limit = own[low] + share * (own[min(low + 1, count - 1)] - own[low])
    reach = math.sqrt(280 / (2 * 23**2) * ((height - 1) ** 2 + (width - 1) ** 2))
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    weights = []
    for anchor in anchors:
        row = []
        for cell in range(len(cells)):
            away = math.dist(cells[anchor], cells[cell])
            near = 1 - min(1, away / reach) if reach else 1.0
            alone = attention[anchor] >= limit or count == len(cells)
            row.append(0.0 if alone and cell != anchor else max(0.0, float(unit[anchor] @ unit[cell])) * near)
        total = sum(row) + 1e-8
        weights.append([1.0 if cell == anchor else value / total for cell, value in enumerate(row)])
    return anchors, weights


@QUICK
@given(GRIDS, AMOUNTS, st.sampled_from([0.0, 0.3, 0.55, 1.0]))
def test_every_image_is_merged_as_by_the_slow_form(
    grids: list[tuple[int, int]], keep: int | float, quantile: float
) -> None:
    rows = [grids, [(3, 5)] * len(grids)]
    strategy = Nuwa(keep=(keep, keep), quantile=quantile)
    bench = benched(strategy, rows)
    attention, states = bench.drawn("cls_attention").exp(), bench.drawn("tower_states", CHANNELS)
    view = bench._view(bench.planned[0], bench.state, bench.planned[0].target)
    answer = strategy.choose(bench.planned[0].stage, view)
    assert isinstance(answer, Merge)
    images = view.images()
    for row, own in enumerate(rows):
        kept = answer.index[row][answer.index[row] >= 0].tolist()
        place = 0
        for image, grid in zip((image for image in images if image.row == row), own, strict=True):
            if not image.quota:
                continue
            seen = attention[row, image.index].tolist()
            anchors, weights = slowly(seen, states[row, image.index], grid, image.quota, quantile)
            assert kept[place : place + image.quota] == image.index[anchors].tolist()
            found = answer.weights[row, place : place + image.quota]
            torch.testing.assert_close(found[:, image.index], torch.tensor(weights), atol=1e-5, rtol=1e-5)
            assert int((found != 0).sum()) == int((found[:, image.index] != 0).sum())
            place += image.quota
        assert place == len(kept)


@QUICK
@given(GRIDS, AMOUNTS, st.floats(0, 1), st.sampled_from(["keep", "renumber"]))
def test_numbers_are_exact_and_a_row_is_itself_in_a_batch(
    grids: list[tuple[int, int]], keep: int | float, second: float, positions: str
) -> None:
    rows = [grids, [(3, 5)] * len(grids), [(7, 6)]]
    final = max(1, int(keep * second)) if isinstance(keep, int) else max(keep * second, 1e-3)
    strategy = Nuwa(keep=(keep, min(final, keep)), positions=positions)
    bench = benched(strategy, rows).run()
    for row, own in enumerate(rows):
        alone = benched(strategy, [own], seeds=[row]).run()
        for number in range(2):
            kept = bench.trace.stages[number].kept[row]
            assert len(kept) == tokens_of(strategy.options.keep[number], sum(math.prod(grid) for grid in own))
            assert kept == alone.trace.stages[number].kept[0]
        torch.testing.assert_close(bench.states[row, kept], alone.states[0, kept], atol=1e-4, rtol=1e-4)
    assert strategy.positions == positions


@QUICK
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_where_the_authors_regions_do_not_suffice(height: int, width: int, least: int) -> None:
    """Theirs: an odd last row or column gives no candidates, unless all cells are."""
    regions = Regions.of(torch.cartesian_prod(torch.arange(height), torch.arange(width)), faithful=True)
    ours = Regions.of(regions.cells, faithful=False)
    for count in range(1, height * width + 1):
        assert int(ours.candidates(count, least, faithful=False).sum()) >= count
        each = least if count <= least * height * width / 4 else math.ceil(4 * count / (height * width))
        pool = (height // 2) * (width // 2) * each
        if each >= 4 and count > least * height * width / 4:
            pool = height * width
        if pool >= count:
            assert int(regions.candidates(count, least, faithful=True).sum()) == pool
        else:
            with pytest.raises(OptionError, match=f"finds {pool} candidates in a grid of {height} × {width}, fewer"):
                regions.candidates(count, least, faithful=True)


def test_cells_at_odd_edges_can_be_anchors() -> None:
    attention = torch.zeros(1, 25)
    attention[0, [4, 9, 14, 19, 24, 20]] = torch.tensor([6.0, 5, 4, 3, 2, 1])  # the last column, and a corner
    kept = benched(Nuwa(keep=(4, 4)), [[(5, 5)]], given={"cls_attention": attention}).run().trace.stages[0].kept[0]
    assert kept == [4, 14, 20, 24]
    theirs = benched(Nuwa(keep=(4, 4), faithful=True), [[(5, 5)]], given={"cls_attention": attention}).run()
    assert not {4, 9, 14, 19, 24, 20} & {*theirs.trace.stages[0].kept[0]}


def test_distances_are_those_of_the_grid() -> None:
    """A token is taken in from as far as on the published grid, as a share of the diagonal."""
    weights = {}
    for side in (6, 24):
        count = side * side
        given = {"tower_states": torch.ones(1, count, CHANNELS), "cls_attention": torch.zeros(1, count)}
        given["cls_attention"][0, [0, 7 * side // 12]] = torch.tensor([1.0, 2])
        for faithful in (False, True):
            strategy = Nuwa(keep=(2, 1), faithful=faithful)
            reads = {**given, "features": torch.ones(1, count, CHANNELS), "project": lambda rows: rows}
            weights[side, faithful] = decided(strategy, reads, (side, side)).weights[0, 0].view(side, side)
    for faithful in (False, True):
        far = max(column for column in range(24) if weights[24, faithful][0, column] > 0)
        assert far == 16  # √280 cells
    assert max(column for column in range(6) if weights[6, False][0, column] > 0) == 3  # of √17.6, 3.6 cells
    assert bool((weights[6, True] > 0).all())


def test_tokens_without_cells_are_one_line() -> None:
    bench = Bench(Nuwa(keep=(5, 2)), [[10]])  # no square: no cells
    assert not bench.layout.grid.ge(0).any()
    attention = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    bench.given["cls_attention"] = attention
    bench.run()
    assert bench.trace.stages[0].kept[0] == [1, 3, 5, 7, 9]
    assert len(bench.trace.stages[1].kept[0]) == 2


def test_everything_kept_is_left_as_it_is() -> None:
    bench = benched(Nuwa(keep=(1.0, 1.0)), [[(3, 3), (2, 2)]])
    features = bench.drawn("features", CHANNELS)
    bench.enter(0)
    assert bench.trace.stages[0].kept[0] == list(range(13))
    torch.testing.assert_close(bench.states[0], features[0, :, :WIDTH] * 2)
    theirs = benched(Nuwa(keep=(1.0, 1.0), faithful=True), [[(4, 4)]])
    theirs.enter(0)
    assert bool(theirs.trace.stages[0].lineage.sum(2).gt(1).any())


def test_an_anchor_of_low_attention_is_itself_and_a_mean_of_others() -> None:
    """A sum whose weights exceed 1: its own share is in the divisor, and not in the mean."""
    strategy, given = Nuwa(keep=(4, 1)), {"tower_states": torch.ones(1, 16, CHANNELS)}
    bench = benched(strategy, [[(4, 4)]], given=given)
    bench.enter(0)
    mass = bench.trace.stages[0].mass[0, bench.trace.stages[0].kept[0]]
    assert bool(((mass >= 1) & (mass < 2)).all())
    assert int((mass == 1).sum()) == 2
    assert int((mass > 1).sum()) == 2


def test_without_a_projector_the_tokens_are_merged() -> None:
    bench = benched(Nuwa(keep=(4, 1)), [[(4, 4)]], readable=set(Read.__subclasses__()) - {Projector})
    rows = bench.embeddings.clone()
    strategy, planned = bench.strategy, bench.planned[0]
    answer = strategy.choose(planned.stage, bench._view(planned, bench.state, planned.target))
    assert isinstance(answer, Merge)
    assert answer.values is None
    bench.enter(0)
    torch.testing.assert_close(bench.states[0, answer.index[0]], answer.weights[0] @ rows[0])


# options and budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [64, 128, 192])
def test_published_numbers(target: int) -> None:
    """n1 = 7/4 B and n2 = B/4 at half the depth; 1, 2 and 3 candidates of each region."""
    stages = list(Nuwa(budget=target / 576).bind(Shape(32, 576)).stages(Shape(32, 576)))
    assert [(stage.layer, stage.tokens) for stage in stages] == [(0, target * 7 // 4), (16, target // 4)]
    assert equivalent_tokens(stages, Shape(32, 576)) == target
    cells = torch.cartesian_prod(torch.arange(24), torch.arange(24))
    for faithful in (False, True):
        each = Regions.of(cells, faithful=faithful).candidates(target * 7 // 4, 1, faithful=faithful)
        assert each[:144].unique().tolist() == [target // 64]


def test_the_default_is_the_published_64() -> None:
    assert [stage.tokens for stage in Nuwa().stages(Shape(32, 576))] == [112, 16]


@QUICK
@given(st.integers(2, 40), st.integers(1, 700), st.floats(0.01, 1))
def test_budgets_are_met_closely(layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = Nuwa(budget=budget).bind(shape)
    except BudgetError:
        assert budget * total < 1
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_what_the_user_set_stays() -> None:
    shape = Shape(32, 576)
    assert Nuwa(budget=0.3, keep=(200, 20)).bind(shape).options.keep == (200, 20)
    with pytest.raises(BudgetError, match="'nuwa' cannot meet budget"):
        Nuwa(budget=0.1, keep=(200, 20)).bind(shape)
    assert [stage.layer for stage in Nuwa(budget=0.3, layer=4).bind(shape).stages(shape)] == [0, 4]


def test_layers_of_other_depths() -> None:
    for layers, half in ((2, 1), (5, 3), (28, 14)):
        assert [stage.layer for stage in Nuwa().stages(Shape(layers, 16))] == [0, half]
    assert [stage.layer for stage in Nuwa(layer=0.99).stages(Shape(4, 16))] == [0, 3]
    for strategy, layers in ((Nuwa(layer=4), 4), (Nuwa(), 1)):
        with pytest.raises(OptionError, match=f"the model has {layers} layers"):
            list(strategy.stages(Shape(layers, 16)))


def test_the_query_is_the_last_row_where_faithful() -> None:
    _, prune = Nuwa(query="seg").stages(Shape(12, 16))
    assert prune.reads == (AttentionFrom("seg"),)
    _, prune = Nuwa(faithful=True).stages(Shape(12, 16))
    assert prune.reads == (AttentionFrom("last"),)
    with pytest.raises(OptionError, match="query"):
        tokenprune.strategy("nuwa", faithful=True, query="seg")


def test_nan_is_refused() -> None:
    given = {"cls_attention": torch.ones(1, 16)}
    given["cls_attention"][0, 3] = float("nan")
    with pytest.raises(InputError, match=r"'nuwa', stage '.*': NaN.* in tokens\.cls_attention .*image token 3 of"):
        benched(Nuwa(keep=(4, 1)), [[(4, 4)]], given=given).enter(0)


@pytest.mark.parametrize("missing", [ClsAttention, TowerStates])
def test_a_tower_without_what_it_needs_is_refused(missing: type[Read]) -> None:
    with pytest.raises(IncompatibleError, match=f"requires {missing.__name__}"):
        Bench(Nuwa(), [[36]], readable=set(Read.__subclasses__()) - {missing})


@pytest.mark.parametrize(
    "bad", [{"keep": (0, 1)}, {"layer": 0}, {"per_region": 5}, {"distance": 0}, {"quantile": 2}, {"positions": "move"}]
)
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("nuwa", **bad)


def test_a_second_number_above_the_first_is_refused() -> None:
    with pytest.raises(OptionError, match=r"would keep \[4, 8\] image tokens, expected no more in a stage"):
        list(Nuwa(keep=(4, 8)).stages(Shape(12, 16)))
