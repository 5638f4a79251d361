"""gIoU by kind on the dataset's own queries, with the image and blind."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from model import decode_masks, sam_pixels, tower_features
from student import Student, pack
from torch.nn import functional
from transformers import SamModel
from vocabulary import Prompts

from tokenprune.datasets.shapes import KINDS, Shapes


class Evaluation:
    """The first `limit` queries of a split; SAM's image embeddings are kept, for its encoder is frozen."""

    def __init__(self, sam: SamModel, split: str, limit: int) -> None:
        self.scenes = list(Shapes().scenes(split, limit))
        self.embeddings = []
        with torch.no_grad():
            for scene in self.scenes:
                pixels = sam_pixels(torch.from_numpy(scene.image)[None])
                self.embeddings.append(sam.vision_encoder(pixels).last_hidden_state)

    @torch.no_grad()
    def __call__(
        self, student: Student, sam: SamModel, prompts: Prompts, side: int, short: bool, blind: bool = False
    ) -> dict[str, float]:
        """Mean IoU of the masks (gIoU) by kind and over all queries ("all"); with `blind` no query sees the image."""
        found: dict[str, list[float]] = defaultdict(list)
        for start in range(0, len(self.scenes), 16):
            part = self.scenes[start : start + 16]
            images = torch.from_numpy(np.stack([scene.image for scene in part]))
            with torch.autocast("cpu", torch.bfloat16):
                image = student.image_tokens(tower_features(student.tower, images)[0], side)
                most = max(len(scene.queries) for scene in part)
                texts = [[q.text for q in scene.queries] for scene in part]
                texts = [row + [row[0]] * (most - len(row)) for row in texts]
                ids, last = pack(prompts, texts, short)
                embedded = student.read(prompts, image, ids, last, short, blind)[2]
                logits = decode_masks(sam, torch.cat(self.embeddings[start : start + 16]), embedded)
            full = functional.interpolate(logits.float(), (256, 256), mode="bilinear", align_corners=False) > 0
            for scene, masks in zip(part, full.numpy(), strict=True):
                for query, mask in zip(scene.queries, masks, strict=False):
                    union = (mask | query.mask).sum()
                    found[query.kind].append(float((mask & query.mask).sum() / (union + 1e-5)))
        scores = {kind: round(float(np.mean(found[kind])), 4) for kind in KINDS if found[kind]}
        return {**scores, "all": round(float(np.mean([v for values in found.values() for v in values])), 4)}
