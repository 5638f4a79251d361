"""The decoder phases: first pointing and prompt embeddings without any mask, then masks through the mask decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Run, decay_groups
from evaluate import Evaluation
from losses import half_size, mask_loss, tower_loss
from model import build_sam, decode_masks, sam_pixels, tower_features
from pool import Pool
from pretrain import batch
from student import TAP_WEIGHTS, Student, answer_loss, pack, pointer_targets, prompt_targets
from torch.nn import functional
from transformers import SamModel
from vocabulary import ADDED_TOKENS, Prompts, train_vocabulary

from tokenprune.datasets.shapes import KINDS
from tokenprune.datasets.shapes.queries import sample_queries
from tokenprune_adapters.common.tokenizer import load_tokenizer


@dataclass
class Stage:
    """One stage of the curriculum: image tokens a side, queries an image, images a step, and what is trained."""

    side: int
    short: bool
    queries: int
    images: int
    tower: bool


STAGES = ((0.40, Stage(8, True, 12, 10, True)), (1.01, Stage(16, False, 14, 8, True)))


DECODED = 4  # queries an image whose masks are decoded in the last phase


def current_stage(progress: float) -> Stage:
    return next(stage for end, stage in STAGES if progress < end)


def load_prompts(work: Path) -> tuple[Prompts, int]:
    folder = work / "tokenizer"
    if not (folder / "added_tokens.json").exists():
        train_vocabulary(folder)
    tokenizer = load_tokenizer(folder, required=list(ADDED_TOKENS))
    return Prompts(tokenizer), len(tokenizer)


def load_sam(work: Path) -> SamModel:
    sam = build_sam()
    sam.load_state_dict(torch.load(work / "sam.pt", weights_only=True)["parts"]["sam"])
    return sam.requires_grad_(False).eval()


def draw_queries(
    rng: np.random.Generator, scenes: Sequence[Any], count: int, weights: np.ndarray
) -> tuple[list[list[str]], list[list[Any]], list[list[str]]]:
    """For every scene `count` queries: texts, the objects they mean, kinds; kinds drawn by `weights`."""
    texts, targets, kinds = [], [], []
    for objects in scenes:
        wanted = rng.multinomial(count, weights)
        drawn = [
            (c, k) for k, n in zip(KINDS, wanted, strict=True) if n for c in sample_queries(rng, objects, k, int(n))
        ]
        drawn += [drawn[int(i)] for i in rng.integers(0, len(drawn), count - len(drawn))]
        texts.append([c[0] for c, _ in drawn])
        targets.append([c[1] for c, _ in drawn])
        kinds.append([k for _, k in drawn])
    return texts, targets, kinds


def optimizers(student: Student, rate: float, sam: SamModel | None = None) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder's layers, AdamW for the rest; the tower learns slower."""
    decoder = [p for p in student.decoder.model.layers.parameters() if p.ndim == 2]
    tower = [p for n, p in student.tower.named_parameters() if p.ndim == 2 and "layers" in n]
    theirs = {id(p) for p in [*decoder, *tower]}
    others = [p for p in student.parameters() if id(p) not in theirs]
    muon = torch.optim.Muon(
        [{"params": decoder, "lr": 2 * rate}, {"params": tower, "lr": 0.8 * rate}],
        weight_decay=0.03,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [{"params": others, "lr": rate, "weight_decay": 0.01}]
    if sam is not None:
        groups += decay_groups([sam.mask_decoder], 0.5 * rate)
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98))]


def train_decoder(work: Path, pool: Pool, seconds: float, masks: bool, rate: float, eval_every: float = 240) -> None:
    """Train tower, projector, decoder and prompt projection; with `masks` also through SAM's mask decoder.

    The first phase starts from `start.pt` in the work folder where there is one (an earlier decoder checkpoint).
    """
    torch.manual_seed(1)
    prompts, vocabulary = load_prompts(work)
    sam, student = load_sam(work), Student(vocabulary)
    shares = [0.15, 0.3, 0.28, 0.27]
    if masks:
        before = torch.load(work / "decoder.pt", weights_only=True)
        student.load_state_dict(before["parts"]["student"])
        shares = before["extra"].get("weights", shares)
        sam.mask_decoder.requires_grad_(True)
    else:
        state = torch.load(work / "tower.pt", weights_only=True)["parts"]
        student.tower.load_state_dict(state["tower"])
        student.heads.load_state_dict(state["heads"], strict=False)
        if (work / "start.pt").exists():
            student.load_state_dict(torch.load(work / "start.pt", weights_only=True)["parts"]["student"], strict=False)
    name = "masks" if masks else "decoder"
    parts: dict[str, Any] = {"student": student, "sam": sam} if masks else {"student": student}
    run = Run(work, name, seconds, parts, optimizers(student, rate, sam if masks else None))
    evaluation = Evaluation(sam, "val", 320)
    rng = np.random.default_rng([7, int(masks), run.step])
    weights = np.array(run.extra.get("weights", shares))
    evaluated = run.spent
    trained = [p for p in [*student.parameters(), *sam.mask_decoder.parameters()] if p.requires_grad]
    while not run.done:
        stage = STAGES[-1][1] if masks else current_stage(run.progress)
        run.set_rate(hold=0.0 if masks else 0.35, floor=0.0)
        loss, report = _step(student, sam, prompts, pool, rng, stage, weights, masks, run.step)
        loss.backward()
        run.update(trained)
        run.tick(report, stage.images)
        if run.spent - evaluated > eval_every or run.done:
            evaluated = run.spent
            go_on = run.pause()
            weights = _evaluate(run, evaluation, student, sam, prompts, stage)
            go_on()
    run.save()


def _step(
    student: Student,
    sam: SamModel,
    prompts: Prompts,
    pool: Pool,
    rng: np.random.Generator,
    stage: Stage,
    weights: np.ndarray,
    masks: bool,
    step: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    images, labels, scenes = batch(pool, rng, stage.images)
    texts, targets, kinds = draw_queries(rng, scenes, stage.queries, weights)
    answer = not stage.short and step % 6 == 0
    ids, last = pack(prompts, texts, stage.short, answer)
    pixels = torch.from_numpy(images)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(stage.tower):
            features, pooled = tower_features(student.tower, pixels)
        image = student.image_tokens(features, stage.side)
        pointers, watched, embedded, states = student.read(prompts, image, ids, last, stage.short)
        wanted = pointer_targets(labels, targets, stage.side)
        goal = prompt_targets(sam, labels, targets)
        entropy = [-(wanted * pointer.float().log_softmax(-1)).sum(-1) for pointer in pointers]
        point = sum(w * e.mean() for w, e in zip(TAP_WEIGHTS, entropy, strict=True))
        attended = sum(-(wanted * log.clamp(min=-20)).sum(-1).mean() for log in watched)
        distance = functional.mse_loss(embedded.float(), goal, reduction="none").mean(-1)
        loss = point + 0.5 * attended + 8 * distance.mean()
        if answer:
            loss = loss + 0.5 * answer_loss(student, states, ids, last, len(prompts.answer))
        if stage.tower:
            extra, _ = tower_loss(student.heads(features, pooled), labels, scenes)
            loss = loss + 0.4 * extra
        report = {
            "point": float(entropy[-1].detach().mean()),
            "attended": float(attended.detach()) / len(watched),
            "distance": float(distance.detach().mean()),
        }
        if masks:
            with torch.no_grad():
                embedding = sam.vision_encoder(sam_pixels(pixels)).last_hidden_state
            some = rng.permutation(stage.queries)[:DECODED]
            logits = decode_masks(sam, embedding, embedded[:, torch.from_numpy(some)])
            solid = torch.from_numpy(
                np.stack([[labels[i] == row[j].label for j in some] for i, row in enumerate(targets)])
            )
            extra, iou = mask_loss(logits.flatten(0, 1), half_size(solid.flatten(0, 1)))
            loss = loss + 2 * extra
            report["iou"] = float(iou)
    hit = wanted.flatten(0, 1).gather(1, pointers[-1].detach().flatten(0, 1).argmax(-1, keepdim=True))[:, 0] > 0
    names = np.array(kinds).ravel()
    for kind in KINDS:
        if (names == kind).any():
            report[f"hit_{kind}"] = float(hit[torch.from_numpy(names == kind)].float().mean())
    return loss, report


def _evaluate(
    run: Run, evaluation: Evaluation, student: Student, sam: SamModel, prompts: Prompts, stage: Stage
) -> np.ndarray:
    """Log gIoU, full and blind; the result is the share of each kind in what follows, more for the weaker ones."""
    student.eval()
    full = evaluation(student, sam, prompts, stage.side, stage.short)
    blind = evaluation(student, sam, prompts, stage.side, stage.short, blind=True)
    student.train()
    run.log({"step": run.step, "giou": full, "blind": blind})
    need = np.array([max(1.05 - full[kind], 0.15) for kind in KINDS])
    weights = 0.05 + 0.8 * need**2 / (need**2).sum()
    run.extra["weights"] = weights.tolist()
    return weights
