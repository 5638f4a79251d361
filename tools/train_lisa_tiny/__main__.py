"""Train lisa-tiny from nothing: `python tools/train_lisa_tiny --work FOLDER`. Every phase resumes where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

PHASES = ("pool", "sam", "tower", "decoder", "masks", "export")


def main() -> None:
    parser = argparse.ArgumentParser(prog="train_lisa_tiny", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the pool, checkpoints and the log")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated; all by default, in this order")
    parser.add_argument("--scenes", type=int, default=30000, help="scenes in the training pool")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sam-minutes", type=float, default=15.5)
    parser.add_argument("--tower-minutes", type=float, default=11)
    parser.add_argument("--decoder-minutes", type=float, default=50)
    parser.add_argument("--masks-minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=Path("adapters/tokenprune_adapters/bundled/lisa_tiny"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    phases = options.phases.split(",")

    from pool import Pool, make_pool

    folder = options.work / "pool"
    if "pool" in phases:
        for split, count in (("val", 300), ("heldout", 200), ("train", options.scenes)):
            make_pool(folder, split, count, options.threads)
    if "sam" in phases:
        from pretrain import train_sam

        train_sam(options.work, Pool(folder, "train"), 60 * options.sam_minutes)
    if "tower" in phases:
        from pretrain import train_tower

        train_tower(options.work, Pool(folder, "train"), 60 * options.tower_minutes)
    if "decoder" in phases:
        from finetune import train_decoder

        train_decoder(options.work, Pool(folder, "train"), 60 * options.decoder_minutes, masks=False, rate=1e-3)
    if "masks" in phases:
        from finetune import train_decoder

        train_decoder(
            options.work, Pool(folder, "train"), 60 * options.masks_minutes, masks=True, rate=3e-4, eval_every=180
        )
    if "export" in phases:
        from finish import finish

        command = (
            f"python tools/train_lisa_tiny --work FOLDER --scenes {options.scenes} --threads {options.threads} "
            f"--sam-minutes {options.sam_minutes:g} --tower-minutes {options.tower_minutes:g} "
            f"--decoder-minutes {options.decoder_minutes:g} --masks-minutes {options.masks_minutes:g}"
        )
        finish(options.work, options.out, command)


if __name__ == "__main__":
    main()
