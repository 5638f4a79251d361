"""The figure at the top of the site and of README.md: one query under a strategy, stage by stage, and its mask.

    python tools/figures/hero.py [--check]

Panels are pictures of their own in docs/images/hero/, so that a page can lay them out for narrow and wide screens;
their captions are text between `<!-- hero -->` and `<!-- end -->`. With `--check` no file is written, and a page whose
captions are not those of a run today is an error.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from stages import BUDGET, IMAGES, MODEL

import tokenprune as tp
from tokenprune.core.trace import StageTrace
from tokenprune.evaluation.samples import Outcome, run_query, sample
from tokenprune.report import panels

ROOT = Path(__file__).resolve().parents[2]
FOLDER = IMAGES / "hero"
PAGE, README = ROOT / "docs" / "index.md", ROOT / "README.md"
STRATEGY = "csp"
QUERY = 10  # of the split "val" of shapes: a relation, in a bright scene
MARKED = re.compile(r"<!-- hero -->\n(.*?)<!-- end -->\n", re.DOTALL)


@dataclass(frozen=True)
class Panel:
    """A picture and its caption: a word or two, then what the picture shows."""

    name: str
    head: str
    text: str
    pixels: panels.RGB


def run() -> tuple[list[Panel], str]:
    """The panels of the run, and a sentence on it."""
    # in double precision, as the pictures of methods
    model = tp.load(MODEL).double()
    record = run_query(model, *sample("shapes", "val", QUERY), strategy=tp.strategy(STRATEGY, budget=BUDGET))
    (untouched,) = run_query(model, *sample("shapes", "val", QUERY)).outcomes
    (outcome,) = record.outcomes
    trace = outcome.trace
    assert trace is not None
    assert outcome.iou is not None
    ledger = trace.ledger
    found = [Panel("image", "Query", f"“{record.query}”", panels.plain(record.image))]
    ends = [*(stage.layer for stage in trace.stages[1:]), len(ledger.entries)]
    for stage, end in zip(trace.stages, ends, strict=True):
        seen = panels.with_tokens(record.image, trace, stage, outcome.row, record.box)
        found.append(Panel(stage.name, f"Layers {stage.layer}–{end - 1}", told(stage, outcome), seen))
    mask = f"IoU {outcome.iou:.2f} ({untouched.iou:.2f} without pruning)"
    found.append(Panel("mask", "Mask", mask, panels.with_mask(record.image, outcome.mask)))
    about = (
        f"One query to the bundled model `{MODEL}` with `{STRATEGY}` at a budget of {BUDGET:g}: "
        f"on average {ledger.equivalent_tokens:g} of {ledger.image_tokens[0]} tokens enter a layer."
    )
    return found, about


def told(stage: StageTrace, outcome: Outcome) -> str:
    """How many tokens a stage keeps, and what becomes of the others."""
    assert outcome.trace is not None
    row = outcome.row
    total, kept = int(outcome.trace.exists[row].sum()), int(stage.active[row].sum())
    if kept == total:
        return f"all {total} tokens"
    rest = "parked" if bool(stage.parked[row].any()) else "dropped"
    return f"{kept} of {total} tokens, others {rest}"


def figures(found: list[Panel], about: str) -> str:
    """The panels as HTML figures, for the site."""
    size = '{ width="256" height="256" }'
    rows = [
        f'<figure markdown="span">![{panel.head}: {panel.text}](images/hero/{panel.name}.png){size}'
        f"<figcaption>**{panel.head}**<br>{panel.text}</figcaption></figure>\n"
        for panel in found
    ]
    return f'<div class="hero-panels" markdown="block">\n\n{"".join(rows)}\n</div>\n\n{about}\n{{ .note }}\n'


def columns(found: list[Panel], about: str) -> str:
    """The panels as a Markdown table, for README.md."""
    lines = [
        [panel.head for panel in found],
        ["---"] * len(found),
        [f"![{panel.head}: {panel.text}](docs/images/hero/{panel.name}.png)" for panel in found],
        [panel.text for panel in found],
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{about}\n"


def written(page: Path, text: str) -> str:
    """The page with these captions."""
    return MARKED.sub(lambda _: f"<!-- hero -->\n\n{text}\n<!-- end -->\n", page.read_text(encoding="utf-8"))


def draw(found: list[Panel], folder: Path = FOLDER) -> None:
    """Write the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for panel in found:
        picture = Image.fromarray((panel.pixels.clip(0, 1) * 255).round().astype(np.uint8))
        target = folder / f"{panel.name}.png"
        picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(target, optimize=True)
        print(f"wrote {target} ({target.stat().st_size // 1000} kB): {panel.head}: {panel.text}")


def main() -> int:
    """Write pictures and pages, or check the pages; the number of pages that differ."""
    found, about = run()
    made = {PAGE: written(PAGE, figures(found, about)), README: written(README, columns(found, about))}
    stale = [page for page, text in made.items() if page.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for page in stale:
            print(f"{page}: differs from a run of today; run python tools/figures/hero.py")
        return len(stale)
    draw(found)
    for page in stale:
        page.write_text(made[page], encoding="utf-8")
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
