"""Pictures of stages for the strategies that compare image tokens with text in CLIP's space.

python tools/figures/clip_stages.py [FOLDER]    docs/images/text-side/cdpruner.png and litelvlm.png, as stages.py
                                                draws the others, on lisa-tiny with a text side of random weights
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages import BUDGET, IMAGES, MODEL, QUERY, method_figure, write

import tokenprune as tp
from tokenprune.evaluation.samples import run_query, sample
from tokenprune.plugins import registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
from clip_checkpoints import whole_clip

STRATEGIES = ("cdpruner", "litelvlm")


def with_text_side(folder: Path) -> Any:
    """The bundled model, its tower made a whole CLIP model: text tower and both projections have random weights."""
    copy = shutil.copytree(registry.models()[MODEL].load()(), folder / MODEL)
    tower = copy / "vision_tower"
    processor = (tower / "preprocessor_config.json").read_bytes()
    whole_clip(tower)
    (tower / "preprocessor_config.json").write_bytes(processor)
    return tp.load(copy)


def main(target: Path = IMAGES / "text-side") -> None:
    """Write a picture for each strategy."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = with_text_side(Path(folder))
        for name in STRATEGIES:
            record = run_query(model, *sample("shapes", "val", QUERY), strategy=tp.strategy(name, budget=BUDGET))
            (outcome,) = record.outcomes
            path = target / f"{name}.png"
            size = write(method_figure(record), path)
            counts = ", ".join(f"{stage.name} {len(stage.kept[0])}" for stage in outcome.trace.stages)
            print(f"wrote {path} ({size // 1000} kB): {record.query!r}, IoU {outcome.iou:.2f}; {counts}")


if __name__ == "__main__":
    main(*(Path(text) for text in sys.argv[1:2]))
