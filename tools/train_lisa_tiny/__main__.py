"""Train lisa-tiny from nothing: `python tools/train_lisa_tiny --work FOLDER`. The same command resumes an earlier run.

What is learnt follows from the seed and the numbers of steps: an interrupted run gives what a run in one go gives.
"""

from __future__ import annotations

import argparse
import fcntl
from pathlib import Path

import torch

PHASES = ("sam", "tower", "decoder", "masks", "export")


def layers(text: str) -> tuple[int, ...]:
    """Layers "7,10", or "none"."""
    return () if text == "none" else tuple(int(layer) for layer in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(prog="train_lisa_tiny", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log, one for each run")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated; all by default, in this order")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the scenes and the queries")
    parser.add_argument(
        "--taught-heads",
        type=layers,
        default="7,10",
        metavar="LAYERS",
        help='layers, from 1, whose first head is taught to look from the mask query at the target; or "none"',
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16: for machines with matrix units")
    parser.add_argument("--sam-steps", type=int, default=1500)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--decoder-steps", type=int, default=5000)
    parser.add_argument("--masks-steps", type=int, default=600)
    parser.add_argument("--out", type=Path, help="folder of the exported checkpoint (default: WORK/model)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    phases = options.phases.split(",")
    options.work.mkdir(parents=True, exist_ok=True)
    lock = (options.work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.exit(3, f"{options.work} is in use by another run; wait for it, or give another folder\n")

    from common import Recipe
    from finetune import train_decoder
    from finish import finish
    from pretrain import train_sam, train_tower

    recipe = Recipe(options.work, options.seed, options.taught_heads, options.bfloat16)
    if "sam" in phases:
        train_sam(recipe, options.sam_steps)
    if "tower" in phases:
        train_tower(recipe, options.tower_steps)
    if "decoder" in phases:
        train_decoder(recipe, options.decoder_steps, masks=False, rate=1e-3)
    if "masks" in phases:
        train_decoder(recipe, options.masks_steps, masks=True, rate=3e-4)
    if "export" in phases:
        taught = ",".join(map(str, options.taught_heads)) or "none"
        precision = " --bfloat16" * options.bfloat16
        command = (
            f"python tools/train_lisa_tiny --work FOLDER --seed {options.seed} --taught-heads {taught} "
            f"--threads {options.threads}{precision} --sam-steps {options.sam_steps} "
            f"--tower-steps {options.tower_steps} --decoder-steps {options.decoder_steps} "
            f"--masks-steps {options.masks_steps}"
        )
        finish(recipe, options.out or options.work / "model", command)


if __name__ == "__main__":
    main()
