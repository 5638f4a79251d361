"""What fine-tuning recovers: `python recovery.py --tuned csp=DIR --tuned fastv=DIR --control DIR` prints a table.

gIoU of a model pruned before and after, on the same queries, with 95 % bootstrap intervals and paired differences over
scenes (`tokenprune.evaluation.statistics`). The control was fine-tuned for as many steps without pruning.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tokenprune as tp
from tokenprune.evaluation.statistics import mean_interval, paired_difference


def records(model: str, strategies: list[str], given: argparse.Namespace) -> Any:
    """The records of strategies on a model, by a sweep, which goes on where it stopped."""
    folder = given.out / Path(model).name
    config = {"models": model, "datasets": given.dataset, "strategies": strategies, "budgets": given.budget,
              "limit": given.limit}  # fmt: skip
    tp.sweep(config, folder, keep_masks=False)
    return tp.read_results(folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lisa-tiny", help="before fine-tuning")
    parser.add_argument("--tuned", action="append", default=[], metavar="STRATEGY=DIR", required=True)
    parser.add_argument("--control", required=True, help="fine-tuned without pruning")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--dataset", default="shapes", help="its split val")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build/recovery"), help="folder of the sweeps")
    given = parser.parse_args()
    tuned = dict(text.split("=", 1) for text in given.tuned)
    names = ["none", *tuned]
    before, control = (records(model, names, given) for model in (given.model, given.control))
    print("| strategy | tokens | before | control | fine-tuned | fine-tuned − before | fine-tuned − control |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        after = records(tuned[name], [name], given) if name in tuned else control
        rows = [table[table.strategy == name].sort_values(["scene", "query"]) for table in (before, control, after)]
        values = [row.iou.tolist() for row in rows]
        scenes = rows[0].scene.tolist()
        cells = [f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in (mean_interval(v, scenes) for v in values)]
        if name not in tuned:
            cells[2] = ""
        for other in values[:2]:
            gap = paired_difference(values[2], other, scenes)
            shown = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], p = {gap.p:.4f}"
            cells.append(shown if name in tuned else "")
        share = (rows[0].equivalent_tokens / rows[0].image_tokens).mean()
        print(f"| `{name}` | {share:.1%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
