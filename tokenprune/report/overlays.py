"""Pictures of samples: the query, the masks, and the active image tokens, stage by stage."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tokenprune.core.trace import StageTrace, Trace
from tokenprune.datasets.base import Query, Scene
from tokenprune.evaluation.samples import Outcome, SampleRecord
from tokenprune.report import panels
from tokenprune.utils.files import replacing
from tokenprune.utils.masks import foreground, ignored

PANEL = 2.3  # inches
TITLE = 34  # characters of a title across a panel
MOST_OBJECTS = 8  # of a query that are drawn one by one


def comparison_sheet(record: SampleRecord) -> Figure:
    """One sample under every strategy: the mask, then the tokens of every stage. More than four go in two columns."""
    lines = len(record.outcomes) if len(record.outcomes) <= 4 else -(-len(record.outcomes) // 2)
    blocks = [record.outcomes[first : first + lines] for first in range(0, len(record.outcomes), max(lines, 1))]
    widths = [1 + max(1, *(len(_stages(outcome)) for outcome in block)) for block in blocks]
    figure, axes = _grid(1 + lines, max(2, sum(widths)), f"“{record.query}”")
    _show(axes[0, 0], panels.plain(record.image), "image")
    if record.target is not None:
        _show(axes[0, 1], panels.with_mask(record.image, record.target, panels.GREEN), "target")
    for number, block in enumerate(blocks):
        first = sum(widths[:number])
        for line, outcome in enumerate(block, 1):
            _show(axes[line, first], panels.with_mask(record.image, outcome.mask), _mask_title(outcome))
            axes[line, first].set_ylabel(
                textwrap.fill(outcome.label, 20), fontsize=10, fontweight="bold", parse_math=False
            )
            for column, stage in enumerate(_stages(outcome), first + 1):
                _tokens(axes[line, column], record, outcome, stage)
    _legend(figure, [stage for outcome in record.outcomes for stage in _stages(outcome)])
    return figure


def inspection_sheet(record: SampleRecord) -> Figure:
    """One sample under one strategy: image, target, mask; tokens stage by stage; the scores of each stage."""
    outcome = record.outcomes[0]
    stages = _stages(outcome)
    scored = [stage for stage in stages if stage is not None and _has_scores(stage, outcome)]
    rows, columns = 2 + bool(scored), max(3, len(stages))
    figure, axes = _grid(rows, columns, f"{outcome.label}: “{record.query}”")
    _show(axes[0, 0], panels.plain(record.image), "image")
    if record.target is not None:
        _show(axes[0, 1], panels.with_mask(record.image, record.target, panels.GREEN), "target")
    _show(axes[0, 2], panels.with_mask(record.image, outcome.mask), _mask_title(outcome))
    for column, stage in enumerate(stages):
        _tokens(axes[1, column], record, outcome, stage)
        if stage is not None and stage in scored and outcome.trace is not None:
            _scores(axes[2, column], record, outcome.trace, stage, outcome.row)
    _legend(figure, stages)
    return figure


def image_panels(record: SampleRecord) -> list[tuple[str, bytes]]:
    """The image, and the target if it is known, as `single_panels`."""
    found = [_alone(record, partial(_show, panel=panels.plain(record.image), title="image"))]
    if record.target is not None:
        target = panels.with_mask(record.image, record.target, panels.GREEN)
        found.append(_alone(record, partial(_show, panel=target, title="target")))
    return found


def single_panels(record: SampleRecord, outcome: Outcome) -> list[tuple[str, bytes]]:
    """The panels of a sample under one strategy as pictures of their own, for pages that arrange them.

    Returns:
        Title and PNG of each: the mask; the tokens of each stage, followed by its scores if it has any.
    """
    mask = panels.with_mask(record.image, outcome.mask)
    found = [_alone(record, partial(_show, panel=mask, title=_mask_title(outcome)))]
    for stage in _stages(outcome):
        found.append(_alone(record, partial(_tokens, record=record, outcome=outcome, stage=stage)))
        if stage is not None and outcome.trace is not None and _has_scores(stage, outcome):
            scores = partial(_scores, record=record, trace=outcome.trace, stage=stage, row=outcome.row)
            found.append(_alone(record, scores, beside="tight"))
    return found


def query_sheet(scene: Scene, query: Query) -> Figure:
    """One query of a dataset: the image, its target with ignored pixels, and each of several objects."""
    objects = query.targets[:MOST_OBJECTS]
    figure, axes = _grid(1 + -(-len(objects) // 2), 2, f"“{query.text}”")
    height, width = scene.image.shape[:2]
    _show(axes[0, 0], panels.plain(scene.image), textwrap.fill(f"{scene.id}, {width}×{height}", TITLE))
    share = float(foreground(query.mask).mean())
    _show(axes[0, 1], panels.with_target(scene.image, query.mask), f"target, {share:.1%}" if share else "no target")
    for number, target in enumerate(objects):
        _show(
            axes[1 + number // 2, number % 2], panels.with_mask(scene.image, target, panels.GREEN), f"object {number}"
        )
    handles = [Patch(color=panels.GREEN, label="target")]
    if ignored(query.mask).any():
        handles.append(Patch(color=panels.ORANGE, label="does not count"))
    if len(query.targets) > len(objects):
        handles.append(Patch(color="white", label=f"{len(query.targets)} objects in all"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def by_budget(record: SampleRecord) -> dict[float | None, SampleRecord]:
    """The sample once per budget, with strategies without one in each; by None if there is at most one budget."""
    budgets = list(dict.fromkeys(o.budget for o in record.outcomes if o.budget is not None))
    if len(budgets) < 2:
        return {None: record}
    parts: dict[float | None, SampleRecord] = {}
    for budget in budgets:
        parts[budget] = replace(record, outcomes=[o for o in record.outcomes if o.budget in (None, budget)])
    return parts


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; returns the path.

    Raises:
        InputError: it cannot be written; an existing file is unchanged.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", facecolor="white", format="png")
    return path


def file_name(text: str) -> str:
    """Letters, digits and dashes of a text, for a file's name."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-")[:60] or "sample"


def _stages(outcome: Outcome) -> list[StageTrace | None]:
    """The stages to draw; None is the unpruned start, if there is no stage at layer 0."""
    if outcome.trace is None:
        return []
    found: list[StageTrace | None] = list(outcome.trace.stages_of(outcome.row))
    starts_full = not found or (found[0] is not None and found[0].layer > 0)
    return [None, *found] if starts_full else found


def _has_scores(stage: StageTrace, outcome: Outcome) -> bool:
    return stage.scores is not None and bool(stage.scores[outcome.row].isfinite().any())


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, Any]:
    lines = textwrap.wrap(title, 28 * columns)
    figure = Figure(figsize=(PANEL * columns, PANEL * 1.11 * rows + 0.3 * len(lines) + 0.4), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=13, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _alone(
    record: SampleRecord, draw: Callable[[Any], None], beside: Literal["tight"] | None = None
) -> tuple[str, bytes]:
    """The title and the PNG of one panel; "tight" adds what is drawn beside it, for about twice the time."""
    height, width = record.image.shape[:2]
    figure = Figure(figsize=(PANEL, PANEL * min(max(height / width, 0.1), 10)))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    draw(axis)
    title = axis.get_title()
    axis.set_title("")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=150, bbox_inches=beside, pad_inches=0.01, facecolor="white", format="png")
        return title, buffer.getvalue()


def _show(axis: Any, panel: panels.RGB, title: str) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.imshow(np.clip(panel, 0, 1), interpolation="nearest")
    axis.set_title(title, fontsize=9, parse_math=False)


def _tokens(axis: Any, record: SampleRecord, outcome: Outcome, stage: StageTrace | None) -> None:
    trace, row = outcome.trace, outcome.row
    assert trace is not None
    _show(axis, panels.with_tokens(record.image, trace, stage, row, record.box), _stage_title(trace, stage, row))
    if stage is not None:
        height, width = record.image.shape[:2]
        places = panels.merged_places(trace, stage, row, record.box)
        places = places.clip(0, (width - 1, height - 1))  # a grid may extend beyond the image
        axis.scatter(places[:, 0], places[:, 1], s=10, color=panels.ORANGE, edgecolors="black", linewidths=0.4)


def _scores(axis: Any, record: SampleRecord, trace: Trace, stage: StageTrace, row: int) -> None:
    assert stage.scores is not None
    values = panels.score_map(trace, stage.scores, row)
    top, left, bottom, right = record.box
    height, width = record.image.shape[:2]
    _show(axis, panels.grey(record.image) * 0.5, f"{stage.name}: scores")
    drawn = axis.imshow(values, cmap="viridis", alpha=0.85, extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5))
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    bar = axis.figure.colorbar(drawn, cax=axis.inset_axes((0.0, -0.07, 1.0, 0.04)), orientation="horizontal")
    bar.ax.tick_params(labelsize=7)


def _stage_title(trace: Trace, stage: StageTrace | None, row: int) -> str:
    total = int(trace.exists[row].sum())
    if stage is None:
        return f"from layer 0: all {total}"
    active = f"from layer {stage.layer}: {int(stage.active[row].sum())} of {total}"
    short = len(stage.name) + len(active) <= TITLE - 2
    title = f"{stage.name}, {active}" if short else "\n".join([*textwrap.wrap(stage.name, TITLE), active])
    parked = int(stage.parked[row].sum())
    return f"{title}\n{parked} parked" if parked else title


def _mask_title(outcome: Outcome) -> str:
    return "mask" if outcome.iou is None else f"mask, IoU {outcome.iou:.2f}"


def _legend(figure: Figure, stages: list[StageTrace | None]) -> None:
    found = [stage for stage in stages if stage is not None]
    handles: list[Any] = [
        Patch(color=panels.GREEN, label="target"),
        Patch(color=panels.VERMILION, label="mask"),
        Patch(facecolor="white", edgecolor="black", label="active tokens: image in colour"),
    ]
    if any(bool(stage.dropped.any()) for stage in found):
        handles.append(Patch(color="0.1", label="dropped"))
    if any(bool(stage.parked.any()) for stage in found):
        handles.append(Patch(color=panels.PARKED, label="parked"))
    if any(stage.lineage is not None for stage in found):
        dot = Line2D([], [], marker="o", linestyle="", color=panels.ORANGE, markeredgecolor="black")
        dot.set_label("carries merged tokens")
        handles.append(dot)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
