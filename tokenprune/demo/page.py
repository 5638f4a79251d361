"""The page: its controls, and what happens when they change."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from tokenprune.demo.offered import Offer
from tokenprune.demo.pictures import LONGEST
from tokenprune.demo.session import Session

WIDTH = 280  # pixels of a column below which columns are put one below the other
DEFAULTS = (("csp", 0.35), ("fastv", 0.35))
LEGEND = (
    "Image tokens in colour take part in the decoder's layers from this stage on. Dark ones are dropped, blue ones "
    "parked for a later stage; an orange dot is a token that others were merged into."
)
CURVE = (
    "Both strategies at budgets from 0.05 to 1. The value is gIoU of this query: against the target if it is known, "
    "else against the mask without pruning (agreement)."
)
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
ONE = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}  # one run at a time


def build(session: Session) -> gr.Blocks:
    """The page of a session."""
    with gr.Blocks(title="tokenprune demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>Token pruning on {escape(session.model.name)}</h1>")
        inputs, button = _question(session)
        outputs = []
        with gr.Row(equal_height=False):
            for part in ("picture", "numbers"):
                with gr.Column(min_width=WIDTH):
                    outputs.append(gr.HTML(elem_id=part))
        with gr.Row(equal_height=False):
            for letter, (name, budget) in zip("ab", _defaults(session.offers), strict=True):
                with gr.Column(min_width=WIDTH):
                    inputs += _controls(session.offers, letter, name, budget)
                    outputs.append(gr.HTML(elem_id=f"side-{letter}"))
        gr.Markdown(LEGEND)
        draw = gr.Button("Draw the curve over budgets", elem_id="draw")
        gr.Markdown(CURVE)
        plot = gr.LinePlot(
            x="budget",
            y="value",
            color="strategy",
            x_lim=[0, 1],
            y_lim=[0, 1],
            height=320,
            visible=False,
            elem_id="curve",
        )
        curves = [plot, gr.HTML(elem_id="problems")]
        _show_at_once(page, session, inputs, outputs, button)
        _draw_on_request(session, inputs, curves, draw)
    return page


def _question(session: Session) -> tuple[list[Any], Any]:
    """The controls of picture and query, and the button."""
    first = next(iter(session.scenes))
    with gr.Row():
        with gr.Column(min_width=WIDTH):
            scene = gr.Dropdown([*session.scenes], value=first, label="Scene of shapes, and a query", elem_id="scene")
            label = f"Or your picture, reduced to {LONGEST} pixels a side"
            file = gr.File(label=label, file_types=["image"], height=150, elem_id="file")
        with gr.Column(min_width=WIDTH):
            query = gr.Textbox(session.query_of(first), label="Query: what to segment", elem_id="query")
            button = gr.Button("Run", variant="primary", elem_id="run")
    return [scene, file, query], button


def _controls(offers: dict[str, Offer], letter: str, name: str, budget: float) -> list[Any]:
    """The controls of a strategy."""
    strategy = gr.Dropdown(
        [*offers],
        value=name,
        label=f"Strategy {letter.upper()}",
        info=offers[name].summary,
        elem_id=f"strategy-{letter}",
    )
    slider = gr.Slider(
        0.01,
        1,
        budget,
        step=0.01,
        label="Budget: share of the image tokens",
        interactive=offers[name].takes_budget,
        elem_id=f"budget-{letter}",
    )
    options = gr.Textbox(
        label="Options, applied by Enter", placeholder="key=value, separated by commas", elem_id=f"options-{letter}"
    )

    def chosen(name: str) -> tuple[Any, Any]:
        return gr.Dropdown(info=offers[name].summary), gr.Slider(interactive=offers[name].takes_budget)

    strategy.input(chosen, strategy, [strategy, slider], **QUIET)
    return [strategy, slider, options]


def _show_at_once(page: Any, session: Session, inputs: list[Any], outputs: list[Any], button: Any) -> None:
    """Run the strategies when a control changes."""
    scene, file, query, *sides = inputs
    moved = [one.submit if isinstance(one, gr.Textbox) else one.input for one in sides]
    run: dict[str, Any] = {"fn": session.show, "inputs": inputs, "outputs": outputs, "show_progress": "minimal", **ONE}
    started = [page.load, button.click, query.submit, *moved]
    gr.on(started, trigger_mode="always_last", **run)
    # A scene brings its query and takes the place of the file, and the other way round.
    scene.input(lambda name: (None, session.query_of(name)), scene, [file, query], **QUIET).then(**run)
    file.upload(lambda: None, None, scene, **QUIET).then(**run)


def _draw_on_request(session: Session, inputs: list[Any], curves: list[Any], button: Any) -> None:
    """Draw the curve on a click, and take it away when it is of other inputs than those of the page."""
    scene, file, query, *sides = inputs

    def draw(*values: Any) -> tuple[Any, str]:
        frame, name, problems = session.draw(*values)
        return gr.LinePlot(value=frame, y_title=name, visible=frame is not None), problems

    drawing = button.click(draw, inputs, curves, **ONE)
    changes = [one.change for one in (scene, file, query, *sides) if not isinstance(one, gr.Slider)]
    gr.on(changes, lambda: (gr.LinePlot(visible=False), ""), None, curves, cancels=[drawing], **QUIET)


def _defaults(offers: dict[str, Offer]) -> list[tuple[str, float]]:
    """The strategies that the page begins with: `DEFAULTS`, as far as the model runs them."""
    others = iter(offers)
    return [(name if name in offers else next(others), budget) for name, budget in DEFAULTS]
