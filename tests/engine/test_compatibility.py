"""Every strategy on every model: it runs as `tokenprune.compatible` says, or is refused before anything runs."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from cli_fixtures import Runner, assert_one_line, run
from compat_models import BUDGET, PLAIN, QUERIES, ROWS, SEGMENTERS, columns, row
from default_selection import EAGER
from fake_segmentation import FakeData, FakeModel
from lisa_checkpoints import write_lisa
from PIL import Image
from transformers import CLIPVisionModel
from vlm_families import CURRENT, FAMILIES, NAMES

import tokenprune as tp
from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.reads import Read
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.tokens import Tokens
from tokenprune.errors import IncompatibleError, UnknownNameError, UnsupportedError
from tokenprune.plugins import registry

__all__ = ["run"]  # the fixture
ROOT = Path(__file__).resolve().parents[2]
COLUMNS = columns()
EVERY = {*SEGMENTERS, *EAGER, PLAIN}
rows = pytest.mark.parametrize("name", [*SEGMENTERS, *NAMES, PLAIN])
PAIRS = [
    pytest.param(name, strategy, marks=[pytest.mark.slow] if (row + column) % 4 and name not in EVERY else [])
    for row, name in enumerate([*SEGMENTERS, *NAMES, PLAIN])
    for column, strategy in enumerate(COLUMNS)
]
current = pytest.mark.skipif(not CURRENT, reason=f"transformers {transformers.__version__} does not have all families")


@dataclass(frozen=True)
class Depth(Read):
    """Something that no model offers."""

    field: ClassVar[str] = "depth"


class ByDepth(tp.Strategy):
    """Wants to see depth."""

    name = "by-depth"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        yield Stage("far", 1, shape.image_tokens, (Depth(),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        return Keep.where(tokens.active)


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[str]]:
    """The modules whose forward is called meanwhile, by type."""
    called: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda part, args: called.append(type(part).__name__))
        for part in module.modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def within_budget(trace: Any, strategy: tp.Strategy) -> bool:
    """Whether every batch row spends no more than the strategy's budget, if it has one."""
    if strategy.budget is None:
        return True
    ledger = trace.ledger
    spent = [sum(entry.image[i] for entry in ledger.entries) for i in range(len(ledger.image_tokens))]
    pairs = zip(spent, ledger.image_tokens, strict=True)
    return all(used <= strategy.budget * total * len(ledger.entries) + 1e-6 for used, total in pairs)


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_it_runs_or_is_refused_before_anything_runs(name: str, strategy: str) -> None:
    """By default a quarter of the strategies on most families, so that each runs on a quarter of these."""
    model, chosen = row(name), COLUMNS[strategy]
    with counted(model.modules) as called:
        found = tp.compatible(chosen, model.model)
        if not found.runs:
            with pytest.raises(IncompatibleError) as refusal:
                model.run(chosen)
            assert str(refusal.value) == found.reason
        assert called == []
        if found.runs:
            trace = model.run(chosen)
            assert called
            assert len(trace.ledger.entries) == 4
            assert bool(trace.stages) == (chosen.name != "none")
            assert within_budget(trace, chosen)


@rows
def test_what_no_model_offers_is_refused_everywhere(name: str) -> None:
    model = row(name)
    found = tp.compatible(ByDepth(), model.model)
    assert (found.runs, bool(found), found.reads, found.strategy) == (False, False, ("Depth",), "by-depth")
    assert found.missing == ("Depth",)
    assert "requires Depth, model provides" in found.reason
    assert repr(found.model) in found.reason
    with counted(model.modules) as called, pytest.raises(IncompatibleError) as refusal:
        model.run(ByDepth())
    assert (str(refusal.value), called) == (found.reason, [])


@current
def test_every_family_that_an_adapter_knows_has_a_row() -> None:
    own = {name: entry.load() for name, entry in tp.adapters().items() if entry.distribution == "tokenprune-vlm"}
    assert {row(name).adapter for name in ROWS if name != PLAIN} == set(own)
    live = {kind for adapter in own.values() for kind in adapter.model_types}
    assert live <= {family.config().model_type for family in FAMILIES.values()}


def test_budgets_are_asked_of_all_strategies_that_have_something_to_move() -> None:
    assert {label for label, strategy in COLUMNS.items() if strategy.budget is None} == {"none", "blind"}
    assert {strategy.budget for strategy in COLUMNS.values()} == {None, BUDGET}


# what decides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_declare_what_their_source_answers(name: str) -> None:
    model = row(name).model
    image = torch.zeros(40, 60, 3, dtype=torch.uint8)
    source = model.vision_source(model.encode_image(image), 1)
    assert (frozenset(source.answers), source.layers) == (model.offers(), model.tower_layers)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_way_into_a_segmenter_refuses_with_the_same_reason(name: str) -> None:
    model = row(name).model
    image = torch.zeros(40, 60, 3, dtype=torch.uint8)
    encoded = model.encode_image(image)
    inputs = model.build_inputs(encoded, QUERIES)
    reason = tp.compatible(ByDepth(), model).reason
    with counted(model) as called:
        for way in (
            lambda: model.segment(image, "the cat", strategy=ByDepth()),
            lambda: model.segment(image, "the cat", strategy=ByDepth(), answer="generate"),
            lambda: model.answer(inputs, ByDepth()),
            lambda: model.run_decoder(inputs, ByDepth()),
            lambda: model.run_generation(inputs, ByDepth(), 2),
        ):
            with pytest.raises(IncompatibleError) as refusal:
                way()
            assert str(refusal.value) == reason
    assert called == []


def test_renumbering_is_refused_under_multimodal_rope_with_advice() -> None:
    found = tp.compatible("prumerge", row("qwen2_vl").model)
    assert "it renumbers positions, which is not defined for a multimodal rotary embedding" in found.reason
    assert found.reason.endswith("use positions='keep'")
    assert (found.reads, found.missing) == (("Projector", "ReceivedAttention", "TowerFeatures", "TowerKeys"), ())
    assert tp.compatible(tp.strategy("prumerge", positions="keep"), row("qwen2_vl").model).runs


def test_reads_follow_what_the_model_offers() -> None:
    assert tp.compatible("prumerge", row("llava").model).reads == (
        "ClsAttention",
        "Projector",
        "TowerFeatures",
        "TowerKeys",
    )
    assert tp.compatible("none", row("llava").model).reads == ()
    assert tp.compatible("fastv", row(PLAIN).model) == tp.Compatibility("fastv", "LlamaForCausalLM", ("AttentionFrom",))


def test_renumbered_positions_are_told_on_segmentation_models() -> None:
    told = tp.compatible("prumerge", row("lisa").model).warning
    assert (
        told
        == "prumerge renumbers positions, from which a model tells places in the image; compare with positions=keep"
    )
    assert not tp.compatible(tp.strategy("prumerge", positions="keep"), row("lisa").model).warning
    assert not tp.compatible("prumerge", row("llava").model).warning


def test_a_loaded_model_answers_as_the_model_inside() -> None:
    from tokenprune_adapters.hf.model import VisionLanguageModel

    live = row("llava_siglip").model
    loaded = VisionLanguageModel(live, "nowhere", "mine")
    for strategy in COLUMNS.values():
        assert tp.compatible(strategy, loaded) == tp.compatible(strategy, live)


def test_what_cannot_be_told() -> None:
    with pytest.raises(UnknownNameError):
        tp.compatible("fastvv", row(PLAIN).model)
    with pytest.raises(UnsupportedError, match=r"FakeModel does not declare .* offers\(\)"):
        tp.compatible("fastv", FakeModel())
    with pytest.raises(UnsupportedError, match="expected exactly one decoder"):
        tp.compatible("fastv", torch.nn.Linear(2, 2))


def test_compare_refuses_before_the_first_query() -> None:
    model = row("lisa").model
    with counted(model) as called, pytest.raises(IncompatibleError, match="'by-depth' is incompatible with model"):
        tp.compare(model, FakeData(), [ByDepth()], limit=1)
    assert called == []
    found = tp.compare(model, FakeData(), ["none", ByDepth()], limit=1, timing_samples=0)
    assert "'by-depth' is incompatible with model" in (found.rows[1].reason or "")
    assert found.rows[0].reason is None


@pytest.fixture
def deep() -> Iterator[None]:
    """`by-depth` is registered."""

    class Plugin:
        @tp.hookimpl
        def tokenprune_register_strategies(self, register: Any) -> None:
            register("by-depth", ByDepth)

    registry.register_plugin(Plugin(), name="deep")
    yield
    registry.unregister_plugin("deep")


@pytest.mark.usefixtures("deep")
def test_a_plugins_strategy_is_asked_by_its_name() -> None:
    assert not tp.compatible("by-depth", row("lisa").model).runs


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "--strategy", "by-depth", "--out", "{tmp}/sample.png"),
        ("segment", "{tmp}/picture.png", "the cat", "--strategy", "by-depth", "--out", "{tmp}/mask.png"),
        ("compare", "--strategies", "by-depth", "--limit", "1"),
    ],
)
def test_commands_tell_a_misfit_in_one_line(
    run: Runner, command: tuple[str, ...], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "picture.png")
    folder = write_lisa(tmp_path / "LISA")
    monkeypatch.setattr(CLIPVisionModel, "forward", None)  # a call would end in a TypeError
    words = [word.format(tmp=tmp_path) for word in command]
    capsys.readouterr()  # what writing the checkpoint printed
    ran = run(*words, "--model", folder)
    assert_one_line(ran, "strategy 'by-depth' is incompatible with model", "requires Depth", "choose another strategy")


# the page ------------------------------------------------------------------------------------------------------------


@current
def test_the_page_has_the_matrix_of_today() -> None:
    script = runpy.run_path(str(ROOT / "tools" / "figures" / "matrix.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["written"](page) == page, "run python tools/figures/matrix.py"


@current
@rows
def test_every_pair_can_be_read_off_the_page(name: str) -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    text = page[page.index("<!-- compatibility: matrix -->") : page.index("<!-- end -->")]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    called = "a decoder alone," if name == PLAIN else f"(`{name}`)"
    (letter,) = [cells[0] for cells in lines if len(cells[0]) == 1 and called in cells[1]]
    (head,) = [cells for cells in lines if cells[0] == "strategy"]
    column = [re.sub("<.*?>", "", cell) for cell in head].index(letter)
    found = dict.fromkeys(labels(text[text.index("On every model: ") :].split(".\n")[0]), "✓")
    for cells in lines:
        if len(cells) == len(head):
            found |= dict.fromkeys(labels(cells[0]), cells[column])
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    for label, strategy in COLUMNS.items():
        verdict, answer = found[label], tp.compatible(strategy, row(name).model)
        if answer.runs:
            assert verdict == "✓"
        else:
            why = reasons[verdict.removeprefix("✗&nbsp;")].replace("`", "")
            if answer.missing:
                assert why == f"Requires {', '.join(answer.missing)}, which the model does not provide."
            else:
                assert answer.reason.endswith(f": {why[0].lower()}{why[1:-1]}")


def labels(cell: str) -> list[str]:
    """The strategies that a cell names, as the matrix's columns are called."""
    found = re.findall(r"`([^`]+)`((?: (?:with )?`[^`]+`)*)", cell)
    return [", ".join((name, *re.findall(r"`([^`]+)`", options))) for name, options in found]
