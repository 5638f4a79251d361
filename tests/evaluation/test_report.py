"""Plots, overlay panels and sheets."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_segmentation import SIDE, FakeData, FakeModel, Front, Tour, Whole
from PIL import Image

from tokenprune.errors import InputError, OptionError
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.evaluation.comparison.tables import si
from tokenprune.report import panels
from tokenprune.report.overlays import (
    _stage_title,
    by_budget,
    comparison_sheet,
    file_name,
    image_panels,
    inspection_sheet,
    query_sheet,
    save,
    single_panels,
)
from tokenprune.report.plots import tradeoff
from tokenprune.report.write import writable_folder


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    strategies = [Whole(), Tour(), "random"]
    return compare(FakeModel(), FakeData(), strategies, budget=[0.5, 0.25], limit=4, timing_samples=0, records=1)


def test_tradeoff_has_a_curve_per_strategy_and_says_what_it_shows(comparison: Comparison) -> None:
    axes = tradeoff(comparison).axes[0]
    curves = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(curves) == ["whole", "tour", "random"]
    rows = sorted((row for row in comparison.rows if row.strategy == "random"), key=lambda row: row.flops_ratio)
    assert curves["random"].get_xdata() == pytest.approx([1 - row.flops_ratio for row in rows])
    assert curves["random"].get_ydata() == pytest.approx([row.giou for row in rows])
    assert "FLOPs" in axes.get_xlabel()
    assert axes.get_ylabel() == "gIoU"
    assert "rectangles" in axes.get_title()
    looks = {(line.get_color(), line.get_marker()) for line in curves.values()}
    assert len(looks) == 3


def test_pictures_print_names_as_they_are(comparison: Comparison, tmp_path: Path) -> None:
    """Dollars are no mathematics, and names that begin with an underscore are in the legend."""
    odd = r"_$\frac{$"
    rows = [row.model_copy(update={"strategy": f"{odd} {row.strategy}"}) for row in comparison.rows]
    rows.append(rows[-1].model_copy(update={"reason": "it is invented", "giou": None}))
    figure = tradeoff(comparison.model_copy(update={"model": odd, "rows": rows}))
    texts = figure.axes[0].get_legend().get_texts()
    names = [f"{odd} {name}" for name in ("whole", "tour", "random")]
    assert [text.get_text() for text in texts] == [*names, f"{odd} random at 0.25: did not run"]
    save(figure, tmp_path / "tradeoff.png")
    record = by_budget(comparison.records[0])[0.25]
    record = replace(record, query=odd, outcomes=[replace(one, label=odd) for one in record.outcomes])
    save(comparison_sheet(record), tmp_path / "comparison.png")
    save(inspection_sheet(record), tmp_path / "inspection.png")
    assert single_panels(record, record.outcomes[0])
    scene = next(FakeData().scenes("val"))
    query = replace(scene.queries[0], text=odd)
    save(query_sheet(replace(scene, id=odd), query), tmp_path / "query.png")


def test_tradeoff_refuses_an_unknown_metric(comparison: Comparison) -> None:
    with pytest.raises(OptionError, match="giou"):
        tradeoff(comparison, "accuracy")


def test_token_panel_lights_active_tints_parked_darkens_dropped() -> None:
    image = np.full((SIDE * 2, SIDE * 2, 3), 200, dtype=np.uint8)
    model = FakeModel()
    trace = model.segment(image, ["a thing"], Tour()).trace
    assert trace is not None
    box = model.grid_box(SIDE * 2, SIDE * 2)
    rest, back, fold = (panels.with_tokens(image, trace, stage, 0, box) for stage in trace.stages)
    lit = np.full(3, 200 / 255)
    assert rest[0, 0] == pytest.approx(lit)
    assert rest[0, 2, 2] > rest[0, 2, 0]  # parked: blue
    assert back == pytest.approx(np.broadcast_to(lit, back.shape))
    assert fold[0, 0] == pytest.approx(lit)
    assert fold[0, 2].max() < 0.2
    assert panels.with_tokens(image, trace, None, 0, box) == pytest.approx(back)
    assert panels.merged_places(trace, trace.stages[2], 0, box).tolist() == [[1, 1], [SIDE * 2 - 1, SIDE * 2 - 1]]
    assert len(panels.merged_places(trace, trace.stages[0], 0, box)) == 0


def test_mask_panel_marks_the_mask_and_only_it() -> None:
    image = np.full((8, 8, 3), 90, dtype=np.uint8)
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    panel = panels.with_mask(image, mask)
    assert panel[2, 2].tolist() == [1, 1, 1]
    assert panel[3, 3, 0] > panel[3, 3, 2]
    assert np.ptp(panel[0, 0]) == pytest.approx(0)


def test_score_map_has_holes_where_no_token_was_scored() -> None:
    model = FakeModel()
    trace = model.segment(np.zeros((12, 12, 3), np.uint8), ["a"], Front(keep=0.5)).trace
    assert trace is not None
    scores = trace.stages[0].scores
    assert scores is not None
    scores = scores.clone()
    scores[0, 1] = float("-inf")
    found = panels.score_map(trace, scores, 0)
    assert found.shape == (SIDE, SIDE)
    assert np.isnan(found).sum() == 1
    assert np.isnan(found[0, 1])


def test_sheets_have_a_titled_panel_for_everything(comparison: Comparison) -> None:
    (record,) = comparison.records
    parts = by_budget(record)
    assert list(parts) == [0.5, 0.25]
    sheet = comparison_sheet(parts[0.25])
    titles = [axis.get_title() for axis in sheet.axes if axis.axison]
    labels = [axis.get_ylabel().replace("\n", " ") for axis in sheet.axes if axis.get_ylabel()]
    assert labels == ["whole", "tour", "random at 0.25"]
    assert titles.count("image") == titles.count("target") == 1
    assert sum(title.startswith("mask, IoU") for title in titles) == 3
    assert sum("from layer" in title for title in titles) == 1 + 3 + 1
    assert record.query in sheet.get_suptitle()
    single = inspection_sheet(by_budget(record)[0.5])
    assert "from layer 0: all 36" in [axis.get_title() for axis in single.axes]


@pytest.mark.parametrize("number", range(4))
def test_single_panels_are_those_of_a_sheet(comparison: Comparison, number: int) -> None:
    record = comparison.records[0]
    outcome = record.outcomes[number]
    sheet = inspection_sheet(replace(record, outcomes=[outcome]))
    found = [*image_panels(record), *single_panels(record, outcome)]
    assert sorted(title for title, _ in found) == sorted(axis.get_title() for axis in sheet.axes if axis.get_title())
    for title, png in found:
        with Image.open(io.BytesIO(png)) as picture:
            if not title.endswith("scores"):  # which have a colour bar
                height, width = record.image.shape[:2]
                assert picture.height / picture.width == pytest.approx(height / width, abs=0.01)


def test_a_comparison_is_text_in_a_notebook_too(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "random" in str(comparison)


def test_many_strategies_are_drawn_in_two_columns() -> None:
    strategies = [Whole() for _ in range(5)]
    for number, strategy in enumerate(strategies):
        strategy.held = number  # type: ignore[attr-defined] # one strategy twice is refused
    found = compare(FakeModel(), FakeData(), strategies, limit=2, timing_samples=0, records=1)
    sheet = comparison_sheet(found.records[0])
    assert len({axis.get_subplotspec().rowspan.start for axis in sheet.axes}) == 4


def test_file_names_hold_no_odd_characters() -> None:
    assert file_name("Où est «../x»?") == "O-est-x"
    assert file_name("…") == "sample"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        writable_folder(tmp_path / "file" / "below")
    assert writable_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (12.34, "12.3"), (1234.0, "1.23 k"), (5.0e12, "5 T")])
def test_numbers_with_prefixes(value: float, text: str) -> None:
    assert si(value) == text


def test_long_stage_names_stand_on_a_line_of_their_own() -> None:
    trace = SimpleNamespace(exists=torch.ones(1, 256, dtype=torch.bool))
    few, none = torch.arange(256)[None] < 52, torch.zeros(1, 256, dtype=torch.bool)
    for name, expected in (
        ("prune", "prune, from layer 6: 52 of 256"),
        ("2:pyramiddrop/drop 1", "2:pyramiddrop/drop 1\nfrom layer 6: 52 of 256"),
    ):
        assert _stage_title(trace, SimpleNamespace(name=name, layer=6, active=few, parked=none), 0) == expected
