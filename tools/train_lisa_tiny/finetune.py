"""The decoder phases: first pointing and prompt embeddings without any mask, then masks through the mask decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Recipe, Run, decay_groups
from evaluate import Evaluation
from losses import half_size, mask_loss, tower_loss
from model import build_sam, decode_masks, sam_pixels, tower_features
from scenes import FORMS, batch, draw_queries
from student import (
    TAP_WEIGHTS,
    Student,
    anchor_targets,
    answer_loss,
    own_targets,
    pack,
    pointer_targets,
    prompt_targets,
)
from torch.nn import functional
from transformers import SamModel
from vocabulary import ADDED_TOKENS, Prompts, train_vocabulary

from tokenprune_adapters.common.tokenizer import load_tokenizer


@dataclass
class Stage:
    """One stage of the curriculum: image tokens a side, queries an image, and images a step."""

    side: int
    short: bool
    queries: int
    images: int


STAGES = ((0.35, Stage(8, True, 20, 10)), (0.7, Stage(16, True, 16, 8)), (1.01, Stage(16, False, 14, 8)))

EVALUATED = 36  # scenes of val, with one query of each form that they allow
EVALUATE_EVERY = 500  # steps; a quarter of it in the last phase
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


def train_decoder(recipe: Recipe, steps: int, masks: bool, rate: float) -> None:
    """Train tower, projector, decoder and prompt projection; with `masks` also through SAM's mask decoder."""
    torch.manual_seed(recipe.seed + 1)
    work = recipe.work
    prompts, vocabulary = load_prompts(work)
    sam, student = load_sam(work), Student(vocabulary, recipe.taught)
    weights = np.full(len(FORMS), 1 / len(FORMS))
    if masks:
        before = torch.load(work / "decoder.pt", weights_only=True)
        student.load_state_dict(before["parts"]["student"])
        weights = np.array(before["extra"].get("weights", weights))
        sam.mask_decoder.requires_grad_(True)
    else:
        state = torch.load(work / "tower.pt", weights_only=True)["parts"]
        student.tower.load_state_dict(state["tower"])
        student.heads.load_state_dict(state["heads"])
    parts: dict[str, Any] = {"student": student, "sam": sam} if masks else {"student": student}
    run = Run(recipe, "masks" if masks else "decoder", steps, parts, optimizers(student, rate, sam if masks else None))
    evaluation = Evaluation(sam, EVALUATED)
    weights = np.array(run.extra.get("weights", weights))
    trained = [p for p in [*student.parameters(), *sam.mask_decoder.parameters()] if p.requires_grad]
    while not run.done:
        stage = STAGES[-1][1] if masks else current_stage(run.progress)
        run.set_rate(hold=0.0 if masks else 0.35, floor=0.0)
        loss, report = _step(run, student, sam, prompts, stage, weights, masks)
        loss.backward()
        run.update(trained)
        run.tick(report, stage.images)
        if run.step % (EVALUATE_EVERY // 4 if masks else EVALUATE_EVERY) == 0 or run.done:
            weights = _evaluate(run, evaluation, student, sam, prompts, stage)
        run.keep()


def _step(
    run: Run, student: Student, sam: SamModel, prompts: Prompts, stage: Stage, weights: np.ndarray, masks: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    rng = run.generator()
    images, labels, scenes = batch(run, stage.images)
    texts, targets, forms = draw_queries(rng, scenes, stage.queries, weights)
    answer = not stage.short and run.step % 6 == 0
    ids, last = pack(prompts, texts, stage.short, answer)
    pixels = torch.from_numpy(images)
    with run.recipe.precision():
        features, pooled = tower_features(student.tower, pixels)
        image = student.image_tokens(features, stage.side)
        read = student.read(prompts, image, ids, last, stage.short)
        wanted = pointer_targets(labels, targets, stage.side)
        goal = prompt_targets(sam, labels, targets)
        to_anchor, *to_target = read.pointers
        entropy = [-(wanted * pointer.float().log_softmax(-1)).sum(-1) for pointer in to_target]
        point = sum(w * e.mean() for w, e in zip(TAP_WEIGHTS, entropy, strict=True))
        attended = sum((-(wanted * log.clamp(min=-20)).sum(-1).mean() for log in read.watched), torch.zeros(()))
        distance = functional.mse_loss(read.prompts.float(), goal, reduction="none").mean(-1)
        loss = point + 0.5 * attended + 8 * distance.mean()
        if not student.taught:  # what attention brings from an image token can be read before attention is learnt
            inside, own_goal = own_targets(labels, scenes, stage.side)
            loss = loss + 3 * functional.mse_loss(read.own.float()[inside], own_goal)
        related, anchors = anchor_targets(labels, scenes, texts, stage.side)
        named = -(anchors * to_anchor.float().log_softmax(-1)[related]).sum(-1)
        loss = loss + 0.5 * named.sum() / related.numel()
        if answer:
            loss = loss + 0.5 * answer_loss(student, read.states, ids, last, len(prompts.answer))
        dense, _ = tower_loss(student.heads(features, pooled), labels, scenes)
        loss = loss + 0.4 * dense
        report = {"point": float(entropy[-1].detach().mean()), "distance": float(distance.detach().mean())}
        if read.watched:
            report["attended"] = float(attended.detach()) / len(read.watched)
        if len(named):
            report["anchor"] = float(named.detach().mean())
        if masks:
            with torch.no_grad():
                embedding = sam.vision_encoder(sam_pixels(pixels)).last_hidden_state
            some = rng.permutation(stage.queries)[:DECODED]
            logits = decode_masks(sam, embedding, read.prompts[:, torch.from_numpy(some)])
            solid = torch.from_numpy(
                np.stack([[labels[i] == row[j].label for j in some] for i, row in enumerate(targets)])
            )
            extra, iou = mask_loss(logits.flatten(0, 1), half_size(solid.flatten(0, 1)))
            loss = loss + 2 * extra
            report["iou"] = float(iou)
    hit = wanted.flatten(0, 1).gather(1, read.pointers[-1].detach().flatten(0, 1).argmax(-1, keepdim=True))[:, 0] > 0
    names = np.array(forms).ravel()
    for form in FORMS:
        if (names == form).any():
            report[f"hit_{form}"] = float(hit[torch.from_numpy(names == form)].float().mean())
    return loss, report


def _evaluate(
    run: Run, evaluation: Evaluation, student: Student, sam: SamModel, prompts: Prompts, stage: Stage
) -> np.ndarray:
    """Log gIoU, at the end also blind; the result is the share of each form in what follows, more for the weaker."""
    student.eval()
    record = {"giou": evaluation(student, sam, prompts, stage.side, stage.short)}
    if run.done:
        record["blind"] = evaluation(student, sam, prompts, stage.side, stage.short, blind=True)
    student.train()
    need = np.array([max(1.05 - record["giou"][form], 0.15) for form in FORMS])
    weights = 0.03 + (1 - 0.03 * len(FORMS)) * need**2 / (need**2).sum()
    run.extra["weights"] = weights.tolist()
    run.log({**record, "weights": dict(zip(FORMS, weights.round(3).tolist(), strict=True))})
    return weights
