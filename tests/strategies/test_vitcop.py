"""ViTCoP against the reference run of the authors' tower and decoder, and what holds for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_llama import Ran, Reference, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategy_bench import Bench
from torch import Tensor

import tokenprune
from tokenprune.core.options import tokens_of
from tokenprune.core.reads import ClsAttention, Crops, Read, TowerKeys
from tokenprune.core.stage import Shape, equivalent_tokens
from tokenprune.core.tokens import ImageTokens
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.errors import BudgetError, IncompatibleError, InputError, OptionError
from tokenprune_adapters.clip.tower import load_tower
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_strategies.vitcop.clusters import Clusters, clusters
from tokenprune_strategies.vitcop.merging import Groups, grouped, new_tokens, quotas
from tokenprune_strategies.vitcop.spending import shallow_tokens
from tokenprune_strategies.vitcop.vitcop import ViTCoP

QUICK = settings(max_examples=40, deadline=None)
IMAGES = st.lists(st.integers(1, 50), min_size=1, max_size=3)
KEEP = st.lists(st.floats(0.02, 1), min_size=3, max_size=3).map(lambda found: tuple(sorted(found, reverse=True)))
SIDE = 24


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Path]) -> Reference:
    return Reference.read(golden("vitcop"))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: pytest.FixtureRequest, case: Reference) -> Any:
    return case.llama(request.param)


def theirs(about: dict[str, Any], number: int, **options: Any) -> ViTCoP:
    """The options that a setting of the authors' means."""
    chosen = about["llm"][number]
    return ViTCoP(
        keep=(chosen["image_rows"], chosen["shallow_rows"], chosen["deep_rows"]),
        layers=(chosen["shallow_layer"], chosen["deep_layer"]),
        clusters=about["tower"][chosen["tower_setting"]]["cluster_percentage"],
        **options,
    )


def grid_places() -> Tensor:
    """float32 [576, 2]: their cells on a grid whose sides are 1."""
    return torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float() / SIDE


# reference data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("setting", [0, 1])
def test_golden_clusters(setting: int, image: int, case: Reference) -> None:
    name, tensors = f"tower{setting}", case.tensors
    kept = tensors[f"{name}.kept_patches"][image]
    found = clusters(tensors["tower_keys"][image, kept], grid_places()[kept], case.about["tower"][setting]["centres"])
    torch.testing.assert_close(found.density, tensors[f"{name}.density"][image], atol=1e-4, rtol=0)
    assert torch.equal(found.centres, tensors[f"{name}.centres"][image])
    assert torch.equal(found.labels, tensors[f"{name}.cluster_labels"][image])


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("setting", [0, 1])
def test_golden_choice_in_the_tower(setting: int, faithful: bool, case: Reference) -> None:
    chosen, tensors = case.about["tower"][setting], case.tensors
    keep = (chosen["vision_prune_ratio"], 9, 3)
    strategy = ViTCoP(keep=keep, clusters=chosen["cluster_percentage"], faithful=faithful)
    given = {"cls_attention": tensors["cls_attention"], "keys": tensors["tower_keys"]}
    bench = Bench(strategy, [[SIDE**2]] * 2, given=given)
    bench.enter(0)
    for row, kept in enumerate(tensors[f"tower{setting}.kept_patches"]):
        assert bench.trace.stages[0].kept[row] == kept.tolist()
        labels = bench.planned[0].group.memory["labels"][row, kept]
        assert names(labels) == names(tensors[f"tower{setting}.cluster_labels"][row])


def names(labels: Tensor) -> list[int]:
    """The clusters of tokens, named by the order of their labels."""
    return labels.unique(return_inverse=True)[1].tolist()


def test_golden_tower_is_ours(case: Reference, golden: Callable[[str], Path]) -> None:
    tower = load_tower(golden("vitcop") / "clip", torch.float32)
    heads = tower.config.num_attention_heads
    for row, pixels in enumerate(case.tensors["pixel_values"].float()):
        with torch.no_grad():
            seen = run_tower(tower, pixels[None])
            attention, keys = seen.cls_attention(-2)[0], seen.keys(-2)[0]
        torch.testing.assert_close(attention * heads, case.tensors["cls_attention"][row], atol=1e-6, rtol=0)
        torch.testing.assert_close(keys, case.tensors["tower_keys"][row], atol=1e-5, rtol=0)
        for setting, chosen in enumerate(case.about["tower"]):
            name = f"tower{setting}"
            kept = attention.argsort(descending=True)[: chosen["kept"]].sort().values
            assert torch.equal(kept, case.tensors[f"{name}.kept_patches"][row])
            features = seen.features[0, kept]
            torch.testing.assert_close(features, case.tensors[f"{name}.features"][row], atol=1e-4, rtol=0)
            found = clusters(keys[kept], grid_places()[kept], chosen["centres"])
            assert torch.equal(found.labels, case.tensors[f"{name}.cluster_labels"][row])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_numbers_follow_from_the_mean(number: int, case: Reference) -> None:
    chosen, layers = case.about["llm"][number], 32  # written out in their code
    mean = chosen["vitcop_pruned_ratio"] * SIDE**2
    first, shallow, deep = (chosen[name] for name in ("image_rows", "shallow_layer", "deep_layer"))
    ratio = case.about["tower"][chosen["tower_setting"]]["vision_prune_ratio"]
    second = round(shallow_tokens(mean / ratio / SIDE**2 * first, first, shallow, deep, layers))
    assert (second, round(second / 5)) == (chosen["shallow_rows"], chosen["deep_rows"])


def stored_groups(case: Reference, number: int) -> Groups:
    return grouped(
        case.tensors[f"llm{number}.key_norm_shallow"],
        case.tensors[f"llm{number}.labels"][0],
        case.about["llm"][number]["shallow_rows"],
    )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_groups(number: int, case: Reference) -> None:
    found, name = stored_groups(case, number), f"llm{number}"
    assert torch.equal(found.kept, case.tensors[f"{name}.selected"])
    places, order = found.places.sort()
    assert torch.equal(places, case.tensors[f"{name}.merged_position"])
    group = torch.where(found.group < 0, -1, order.argsort()[found.group])
    assert torch.equal(group, case.tensors[f"{name}.merge_group"])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_merged_states(number: int, llama: Any, case: Reference) -> None:
    name, first = f"llm{number}", case.about["PRE"]
    rows, text = case.tensors[f"{name}.image_rows"], case.tensors["text_embeds"]
    with torch.no_grad():
        given = torch.cat((text[:, :first], rows, text[:, first:]), 1)
        states = llama(inputs_embeds=given, output_hidden_states=True).hidden_states
    before = states[case.about["llm"][number]["shallow_layer"]][0, first : first + rows.shape[1]]
    every = torch.arange(rows.shape[1])
    made = new_tokens(ImageTokens(0, 0, every, 0, every), stored_groups(case, number))
    places, order = made.index.sort()
    assert torch.equal(places + first, case.tensors[f"{name}.shallow_positions"])
    expected = case.tensors[f"{name}.hidden_after_shallow"][0]
    torch.testing.assert_close((made.weights @ before)[order], expected, atol=1e-4, rtol=0)


def whole_run(case: Reference, llama: Any, number: int, **options: Any) -> Ran:
    """Tower's choice and decoder in one: all 576 rows enter, of which those that are dropped at once are zeros."""
    chosen, tensors = case.about["llm"][number], case.tensors
    image, first = chosen["image"], case.about["PRE"]
    kept = tensors[f"tower{chosen['tower_setting']}.kept_patches"][image]
    rows = torch.zeros(1, SIDE**2, tensors["text_embeds"].shape[-1])
    rows[:, kept] = tensors[f"llm{number}.image_rows"]
    text = tensors["text_embeds"]
    mask = torch.zeros(1, text.shape[1] + SIDE**2, dtype=torch.bool)
    mask[:, first : first + SIDE**2] = True
    vision = VisionSource(
        {
            ClsAttention: lambda read: {-2: tensors["cls_attention"][image, None]}[read.layer],
            TowerKeys: lambda read: {-2: tensors["tower_keys"][image, None]}[read.layer],
        },
        case.about["clip"]["layers"],
    )
    whole = torch.cat((text[:, :first], rows, text[:, first:]), 1)
    return run(llama, theirs(case.about, number, **options), whole, mask, vision=vision)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_whole_run(number: int, faithful: bool, llama: Any, case: Reference) -> None:
    chosen, tensors, name = case.about["llm"][number], case.tensors, f"llm{number}"
    found = whole_run(case, llama, number, faithful=faithful)
    kept = tensors[f"tower{chosen['tower_setting']}.kept_patches"][chosen["image"]]
    tower, merge, *_, prune = found.trace.stages
    assert tower.kept[0] == kept.tolist()
    assert merge.scores is not None
    assert prune.scores is not None
    torch.testing.assert_close(-merge.scores[0, kept], tensors[f"{name}.key_norm_shallow"], atol=1e-5, rtol=0)
    shallow = kept[tensors[f"{name}.shallow_positions"] - case.about["PRE"]]
    assert merge.kept[0] == shallow.tolist()
    torch.testing.assert_close(-prune.scores[0, shallow], tensors[f"{name}.key_norm_deep"], atol=1e-4, rtol=0)
    assert prune.kept[0] == shallow[tensors[f"{name}.deep_kept"]].tolist()
    lengths = [entry.image[0] + entry.other[0] for entry in found.trace.ledger.entries]
    assert lengths == chosen["layer_input_lengths"]
    logits = found.logits[:, found.rows()]
    if faithful:
        torch.testing.assert_close(found.hidden[:, found.rows()], tensors[f"{name}.last_hidden"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits, tensors[f"{name}.logits"], atol=1e-4, rtol=0)
    else:  # ours stay, and theirs become row numbers
        assert not torch.allclose(logits, tensors[f"{name}.logits"], atol=1e-3)


# any input ------------------------------------------------------------------------------------------------------------


def slow_clusters(keys: Tensor, places: Tensor, count: int) -> list[int]:
    """Labels, with loops over patches in double precision."""
    many = range(len(keys))

    def distance(rows: Tensor, i: int, j: int) -> float:
        return 0.0 if i == j else math.sqrt(float((rows[i].double() - rows[j].double()).square().sum()) + 1e-8)

    apart = [[distance(keys, i, j) for j in many] for i in many]
    density = [sum(math.exp(-((d / 8) ** 2)) for d in row) for row in apart]
    delta, parent = [math.inf] * len(keys), [0] * len(keys)
    for i in many:
        for j in many:
            fits = i != j and density[j] >= density[i] and distance(places, i, j) <= 0.6
            if fits and apart[i][j] < delta[i]:
                delta[i], parent[i] = apart[i][j], j
    centres = sorted(many, key=lambda i: -delta[i] * density[i])[:count]
    labels = []
    for start in many:
        place, steps = start, 0
        while place not in centres and steps <= len(keys):
            place, steps = parent[place], steps + 1
        labels.append(centres.index(place) if place in centres else -1)
    return labels


@QUICK
@given(st.integers(1, 4), st.sampled_from([1, 3, 4, 6, 7]), st.integers(0, 99), st.floats(0.01, 1))
def test_clusters_are_those_of_the_slow_form(rows: int, columns: int, seed: int, share: float) -> None:
    size = rows * columns
    keys = 6 * torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    places = cells / torch.tensor([rows, columns])
    count = max(1, int(share * size))
    found = clusters(keys, places, count)
    assert found.labels.tolist() == slow_clusters(keys, places, count)
    assert len(found.centres.unique()) == count


def test_patches_that_lead_to_no_centre_are_a_cluster() -> None:
    """Two pairs of equal keys far apart on the grid: each is the other's parent, and one pair has no centre."""
    keys, places = (
        torch.tensor([[0.0], [0.0], [90.0], [90.0]]),
        torch.tensor([[0.0, 0], [0, 0.1], [0.9, 0], [0.9, 0.1]]),
    )
    assert clusters(keys, places, 1).labels.tolist() == [0, 0, -1, -1]


@QUICK
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 99), st.floats(0, 1))
@example([2, 2, 2, 2], 0, 0.6)
def test_quotas_are_exact_and_fit_into_their_clusters(sizes: list[int], seed: int, share: float) -> None:
    count = len(sizes) + int(share * (sum(sizes) - len(sizes)))
    found = quotas(sizes, torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)), count)
    assert sum(found) + len(sizes) == count
    assert all(0 <= quota < size for quota, size in zip(found, sizes, strict=True))


@QUICK
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40), st.integers(0, 99), st.floats(0, 1))
def test_groups_are_those_of_the_slow_form(labels: list[int], seed: int, share: float) -> None:
    scores, count = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)), 1
    count = max(1, int(share * len(labels)))
    found = grouped(scores, torch.tensor(labels), count)
    members = {label: [i for i, own in enumerate(labels) if own == label] for label in sorted(set(labels))}
    sums = {label: float(scores[own].double().sum()) for label, own in members.items()}
    if len(members) <= count:
        counts = quotas([len(own) for own in members.values()], torch.tensor([*sums.values()]), count)
        kept = [
            i for own, n in zip(members.values(), counts, strict=True) for i in sorted(own, key=scores.__getitem__)[:n]
        ]
        groups = [[i for i in own if i not in kept] for own in members.values()]
    else:
        small = sorted(members, key=sums.__getitem__)[: count - 1]
        kept, groups = [], [members[label] for label in small]
        groups.append([i for i, label in enumerate(labels) if label not in small])
    assert found.kept.tolist() == sorted(kept)
    assert found.places.tolist() == [own[len(own) // 2] for own in groups]
    assert [(found.group == number).nonzero().flatten().tolist() for number in range(len(groups))] == groups
    made = new_tokens(ImageTokens(0, 0, torch.arange(len(labels)), 0, torch.arange(len(labels))), found)
    assert len(made.index) == count
    torch.testing.assert_close(made.weights.sum(1), torch.tensor([1.0] * len(kept) + [2.0] * len(groups)))


@QUICK
@given(IMAGES, KEEP, st.floats(0.01, 1), st.sampled_from(["renumber", "keep"]))
def test_numbers_are_exact_and_a_row_is_itself_in_a_batch(
    images: list[int], keep: tuple[float, ...], share: float, positions: str
) -> None:
    rows = [images, [17] * len(images), [36]]
    strategy = ViTCoP(keep=keep, clusters=share, positions=positions)
    together = Bench(strategy, rows).run()
    for row, own in enumerate(rows):
        alone = Bench(strategy, [own], seeds=[row]).run()
        for number, amount in enumerate(keep):
            kept = together.trace.stages[number].kept[row]
            assert len(kept) == tokens_of(amount, sum(own))
            assert kept == alone.trace.stages[number].kept[0]
        torch.testing.assert_close(together.states[row, kept], alone.states[0, kept], atol=1e-5, rtol=1e-5)


@QUICK
@given(IMAGES, KEEP)
def test_every_image_keeps_its_shortest_keys(images: list[int], keep: tuple[float, ...]) -> None:
    bench = Bench(ViTCoP(keep=keep), [images])
    norms = bench.drawn("layer_keys", 8).norm(dim=-1)[0]
    _, merge, prune = bench.run().trace.stages
    first = 0
    for size in images:
        before, after = ([i for i in stage.kept[0] if first <= i < first + size] for stage in (merge, prune))
        assert after == sorted(sorted(before, key=norms.__getitem__)[: len(after)])
        first += size


def test_what_loses_no_token_stays_as_it_is() -> None:
    """In their code even a group of one token is added to itself."""
    for faithful, factor in ((False, 1), (True, 2)):
        bench = Bench(ViTCoP(keep=(1.0, 1.0, 1.0), clusters=1.0, faithful=faithful), [[SIDE**2]], layers=3)
        bench.enter(0)
        bench.enter(1)
        torch.testing.assert_close(bench.states, factor * bench.embeddings)
    both = Bench(ViTCoP(keep=(20, 14, 5)), [[9], [16]])
    both.enter(0)
    both.enter(1)
    assert both.states[0].equal(both.embeddings[0])
    assert [stage.kind for stage in both.trace.stages] == ["keep", "merge"]


def clustered(grid: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and mask after the tower, of one row of tokens with these cells [N, 2]."""
    bench = Bench(ViTCoP(keep=(0.5, 0.2, 0.1)), [[len(grid)]], given=given)
    cells = torch.full((*bench.layout.valid.shape, 2), -1)
    cells[bench.layout.image_tokens] = grid
    bench.layout = replace(bench.layout, grid=cells)
    bench.enter(0)
    return bench.planned[0].group.memory["labels"][0], bench.trace.stages[0].active[0]


@pytest.mark.parametrize("shape", [(9, 16), (16, 9), (1, 30), (30, 1), (3, 5)])
def test_grids_that_are_not_square(shape: tuple[int, int]) -> None:
    grid = torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, 2)
    draw = torch.Generator().manual_seed(0)
    keys, attention = 4 * torch.randn(1, len(grid), 5, generator=draw), torch.rand(1, len(grid), generator=draw)
    labels, mask = clustered(grid, keys=keys, cls_attention=attention)
    kept = attention[0].argsort(descending=True)[: len(grid) // 2].sort().values
    assert torch.equal(mask.nonzero().flatten(), kept)
    places = grid.float() / torch.tensor(shape)
    expected: Clusters = clusters(keys[0, kept], places[kept], max(1, int(0.18 * len(kept))))
    assert torch.equal(labels[kept], expected.labels)


def test_crops_have_clusters_of_their_own() -> None:
    crops = torch.tensor([[0] * 18 + [1] * 18])
    bench = Bench(ViTCoP(keep=(0.5, 4, 2), clusters=0.2), [[36]], given={"crops": crops})
    bench.enter(0)
    kept, labels = bench.trace.stages[0].kept[0], bench.planned[0].group.memory["labels"][0]
    assert crops[0, kept].bincount().tolist() == [9, 9]
    assert not {*labels[kept[:9]].tolist()} & {*labels[kept[9:]].tolist()}


@pytest.mark.parametrize(
    ("rows", "found"), [([[24 * 23]], "552 tokens"), ([[576, 576]], "2 images or crops"), ([[576], [25]], "5 x 5")]
)
def test_their_code_processes_one_image_of_24_x_24(rows: list[list[int]], found: str) -> None:
    strategy = ViTCoP(faithful=True)
    with pytest.raises(OptionError, match=f"processes one image of 24 x 24 patches, and batch row . has .*{found}"):
        Bench(strategy, rows).enter(0)


@pytest.mark.parametrize("total", [576, 2880])
@pytest.mark.parametrize(("mean", "numbers"), [(1 / 3, (288, 253)), (2 / 9, (230, 165)), (1 / 9, (172, 77))])
def test_published_numbers_are_those_of_their_budgets(mean: float, numbers: tuple[int, int], total: int) -> None:
    """Theirs are rounded up at the end, and exceed the mean by a tenth of a token; ours keep what that leaves."""
    bound = ViTCoP(budget=mean).bind(Shape(32, total))
    first, second, third = bound.options.keep
    if total == 576:
        assert numbers[0] <= first < numbers[0] + 8
        assert second == numbers[1]
    assert third == pytest.approx(second / 5, abs=4)
    assert bound.options.clusters == pytest.approx(0.09 + 0.27 * mean, abs=1e-3)


def test_the_defaults_are_the_published_third() -> None:
    stages = list(ViTCoP().stages(Shape(32, 576)))
    assert [(stage.layer, stage.tokens) for stage in stages] == [(0, 288), (2, 253), (22, 51)]
    assert equivalent_tokens(stages, Shape(32, 576)) == pytest.approx(192.06, abs=0.01)


@QUICK
@given(st.integers(3, 40), st.integers(1, 700), st.floats(0.01, 1))
def test_budgets_are_met_closely(layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = ViTCoP(budget=budget).bind(shape)
    except BudgetError:
        assert budget * total < 1
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert budget * total - 1 - 1e-6 < spent <= budget * total + 1e-6


def test_what_the_user_set_stays() -> None:
    shape = Shape(32, 576)
    assert ViTCoP(budget=0.3, clusters=0.5).bind(shape).options.clusters == 0.5
    assert ViTCoP(budget=0.5, keep=(288, 200, 40)).bind(shape).options.keep == (288, 200, 40)
    with pytest.raises(BudgetError, match=r"'vitcop' cannot meet budget 0\.1"):
        ViTCoP(budget=0.1, keep=(288, 200, 40)).bind(shape)


@pytest.mark.parametrize("missing", [ClsAttention, TowerKeys])
def test_a_tower_without_what_it_needs_is_refused(missing: type[Read]) -> None:
    with pytest.raises(IncompatibleError, match=f"requires {missing.__name__}"):
        Bench(ViTCoP(), [[30]], readable=set(Read.__subclasses__()) - {missing})


def test_without_crops_an_image_is_one() -> None:
    bench = Bench(ViTCoP(keep=(20, 10, 5)), [[30]], readable=set(Read.__subclasses__()) - {Crops}).run()
    assert [len(stage.kept[0]) for stage in bench.trace.stages] == [20, 10, 5]


@pytest.mark.parametrize("field", ["cls_attention", "layer_keys"])
def test_nan_is_refused(field: str) -> None:
    bench = Bench(ViTCoP(keep=(1.0, 10, 5)), [[30]])
    value = bench.drawn(field, *([8] if field == "layer_keys" else []))
    value[0, 3] = float("nan")
    bench.given[field] = value
    with pytest.raises(InputError, match=rf"'vitcop', stage '.*': NaN.* in tokens\.{field} .*image token 3 of"):
        bench.run()


@pytest.mark.parametrize(
    "bad", [{"keep": (0, 1, 1)}, {"keep": (9, 5)}, {"layers": (0, 3)}, {"clusters": 0.0}, {"positions": "move"}]
)
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))}"):
        tokenprune.strategy("vitcop", **bad)


def test_numbers_that_grow_and_models_of_two_layers_are_refused() -> None:
    with pytest.raises(OptionError, match=r"would keep \[10, 20, 5\] image tokens"):
        list(ViTCoP(keep=(10, 20, 5)).stages(Shape(12, 30)))
    with pytest.raises(IncompatibleError, match="has 2 stages after the first layer, and the model has 2 layers"):
        list(ViTCoP().stages(Shape(2, 30)))
    with pytest.raises(OptionError, match="'faithful' and positions='keep' found"):
        ViTCoP(faithful=True, positions="keep")
