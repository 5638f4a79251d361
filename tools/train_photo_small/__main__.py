"""Train photo-small: `python tools/train_photo_small --work FOLDER --ccp FOLDER --coco FOLDER`; it goes on where it
stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from evaluate import evaluate, fixed_scenes, natural_scenes
from export import export
from head import Eyes, train_head
from model import PhotoModel, faster_dtype
from runs import Phase
from scenes import Natural, Strips
from training import STAGES, optimizer_of, train

from tokenprune.datasets.strips.photographs import Photographs
from tokenprune_adapters.photos.base_weights import read_decoder, read_tower


def main() -> None:
    """Run the phases."""
    parser = argparse.ArgumentParser(prog="train_photo_small", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--ccp", type=Path, required=True, help="Clothing Co-Parsing: photos, labels, labels.json")
    parser.add_argument("--coco", type=Path, required=True, help="pictures and instances_*.json")
    parser.add_argument("--blind", action="store_true", help="the control: train without seeing the picture")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps of all stages")
    parser.add_argument("--head-steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--depth", type=int, help="with --test: after how many layers to read (4, 12 or 30)")
    parser.add_argument("--export", type=Path, help="with --test: also write the model into this folder")
    parser.add_argument("--test", action="store_true", help="only evaluate what there is, on the test queries")
    options = parser.parse_args()
    name = "blind" if options.blind else "model"
    if options.test and not (options.work / f"{name}.pt").exists():
        parser.error(f"{options.work} has no {name}.pt to test yet; train first")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    natural = Natural(options.coco, "train2017")
    torch.manual_seed(1)
    eyes = Eyes(read_tower().to(memory_format=torch.channels_last))
    strips = Strips(Photographs(options.ccp, "train"))
    train_head(options.work, eyes, strips, natural, options.head_steps)
    decoder, tokenizer = read_decoder()
    depths = sorted({depth for one in STAGES for depth in one.depths})
    model = PhotoModel(decoder, tokenizer, depths, options.blind, faster_dtype())
    if options.test:
        phase = Phase(options.work, name, model.trained(), optimizer_of(model.trained()))
    else:
        phase = train(options.work, name, eyes, model, strips, natural, options.scale, options.every)
    depth = options.depth or phase.extra["depth"]
    conditions = ("full",) if options.blind else ("full", "wrong", "blind", "oracle")
    test = Strips(Photographs(options.ccp, "test"))
    result = {
        "step": phase.step,
        "depth": depth,
        "strips": evaluate(eyes, model, fixed_scenes(test, 22, 110, 4), depth, conditions, True),
        "coco": evaluate(eyes, model, natural_scenes(Natural(options.coco, "val2017")), depth, conditions, True),
    }
    if options.export is not None:
        export(eyes, model, depth, options.export)
    print(json.dumps(result, indent=1))
    (options.work / f"test-{name}-{phase.step}-{depth}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
