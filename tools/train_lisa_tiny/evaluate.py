"""gIoU by form on held-out queries, with the image and blind."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from model import decode_masks, sam_pixels, tower_features
from scenes import FORMS, KIND_OF
from student import Student, pack
from torch.nn import functional
from transformers import SamModel
from vocabulary import Prompts

from tokenprune.datasets.shapes import KINDS
from tokenprune.datasets.shapes.dataset import scene_generator
from tokenprune.datasets.shapes.queries import sample
from tokenprune.datasets.shapes.scenes import DrawnScene, SceneObject, draw_scene

Asked = tuple[DrawnScene, list[tuple[str, str, SceneObject]]]
"""A scene, and for each of its queries the form, the text and the object meant."""


def held_out_queries(split: str, scenes: int, seed: int = 1000) -> list[Asked]:
    """The first scenes of a split with one query of each form that they allow; no result stands on the default seed."""
    asked = []
    for index in range(scenes):
        rng = scene_generator(split, seed, index)
        scene = draw_scene(rng, held_out=split == "heldout")
        drawn = [(form, c) for form, make in FORMS.items() for c in sample(rng, make(scene.objects), 1)]
        asked.append((scene, [(form, text, item) for form, (text, item) in drawn]))
    return asked


def by_form_and_kind(scores: dict[str, list[float]]) -> dict[str, float]:
    """Means by form, of the forms of a kind, and of all forms ("all"): every form counts the same."""
    means = {form: float(np.mean(scores[form])) for form in FORMS if scores.get(form)}
    for kind in KINDS:
        of_kind = [mean for form, mean in list(means.items()) if KIND_OF.get(form) == kind]
        means.setdefault(kind, float(np.mean(of_kind)))
    means["all"] = float(np.mean([means[form] for form in FORMS if form in means]))
    return {name: round(mean, 4) for name, mean in means.items()}


class Evaluation:
    """Queries of the first `scenes` of val; SAM's image embeddings are kept, for its encoder is frozen."""

    def __init__(self, sam: SamModel, scenes: int) -> None:
        self.asked = held_out_queries("val", scenes)
        self.embeddings = []
        with torch.no_grad():
            for scene, _ in self.asked:
                pixels = sam_pixels(torch.from_numpy(scene.image)[None])
                self.embeddings.append(sam.vision_encoder(pixels).last_hidden_state)

    @torch.no_grad()
    def __call__(
        self, student: Student, sam: SamModel, prompts: Prompts, side: int, short: bool, blind: bool = False
    ) -> dict[str, float]:
        """Mean IoU of the masks (gIoU) by form, kind and over all; with `blind` no query sees the image."""
        found: dict[str, list[float]] = defaultdict(list)
        for start in range(0, len(self.asked), 10):
            part = self.asked[start : start + 10]
            images = torch.from_numpy(np.stack([scene.image for scene, _ in part]))
            image = student.image_tokens(tower_features(student.tower, images)[0], side)
            most = max(len(queries) for _, queries in part)
            texts = [[text for _, text, _ in queries] for _, queries in part]
            texts = [row + [row[0]] * (most - len(row)) for row in texts]
            ids, last = pack(prompts, texts, short)
            embedded = student.read(prompts, image, ids, last, short, blind).prompts
            logits = decode_masks(sam, torch.cat(self.embeddings[start : start + 10]), embedded)
            full = functional.interpolate(logits.float(), (256, 256), mode="bilinear", align_corners=False) > 0
            for (scene, queries), masks in zip(part, full.numpy(), strict=True):
                for (form, _, item), mask in zip(queries, masks, strict=False):
                    target = scene.labels == item.label
                    found[form].append(float((mask & target).sum() / ((mask | target).sum() + 1e-5)))
        return by_form_and_kind(found)
