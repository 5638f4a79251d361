"""What a segmentation model is trained on: its forced answers to a scene's queries, and the masks of these answers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tokenprune import Strategy
from tokenprune.datasets.base import Scene
from tokenprune.utils.masks import foreground, ignored
from tokenprune_adapters.llava.prompt import prompt_ids

WEIGHTS = {"answer": 1.0, "bce": 2.0, "dice": 0.5}
"""Of the parts of the loss: those of LISA's training (Lai et al., arXiv 2308.00692)."""


def scene_losses(model: Any, scene: Scene, strategy: Strategy) -> dict[str, Tensor]:
    """The parts of the loss of one scene, unweighted; its queries are one batch.

    Args:
        model: a segmentation model that `tokenprune.load` gave (LISA, GLaMM, PixelLM).
        scene: an image, and queries with target masks.
        strategy: the decoder is pruned by it, as in `segment`.
    """
    with torch.no_grad():  # what comes before the decoder is not trained
        encoded = model.encode_image(scene.image)
    texts = [query.text for query in scene.queries]
    inputs = model.build_inputs(encoded, texts, is_sentence=[query.is_sentence for query in scene.queries])
    states, _ = model.run_decoder(inputs, strategy)
    ids, group = inputs.sequence.token_ids.tolist(), len(model.seg_tokens)
    found = [(row, place + step - 1) for row, said in enumerate(ids) for place in model.mask_places(said)
             for step in range(group)]  # fmt: skip
    rows, columns = zip(*found, strict=True)
    low_res, _ = model.low_res_logits(states[list(rows), list(columns)], encoded)
    bce, dice = mask_losses(model.to_original_size(low_res, encoded), [query.mask for query in scene.queries])
    return {"answer": answer_loss(model, inputs, states), "bce": bce, "dice": dice}


def answer_loss(model: Any, inputs: Any, states: Tensor) -> Tensor:
    """Cross-entropy of the answers' tokens, each predicted by the state [rows, S, H] before it."""
    ids = inputs.sequence.token_ids
    asked = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(inputs.prompts):
        whole = prompt_ids(model.tokenizer, text)
        image = inputs.encoded.image_embeddings.shape[1] - 1  # one placeholder stands for so many more positions
        for answer in re.finditer(r"ASSISTANT:(.*?</s>)", text, re.DOTALL):
            start, end = (_shared(prompt_ids(model.tokenizer, text[:cut]), whole) for cut in answer.span(1))
            asked[row, start + image : end + image] = True
    logits = model.decoder.lm_head(states[:, :-1][asked[:, 1:]])
    return functional.cross_entropy(logits.float(), ids[asked])


def _shared(some: list[int], whole: list[int]) -> int:
    """How many ids two prompts begin with in common."""
    pairs = zip(some, whole, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), len(some))


def mask_losses(logits: Tensor, targets: list[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss of masks [n, H, W], each the mean over masks; ignored pixels count in neither.

    Args:
        logits: [n, H, W].
        targets: n target masks [H, W], see `tokenprune.utils.masks`.
    """
    if len(logits) != len(targets):
        raise ValueError(f"the model's forced answers made {len(logits)} masks for {len(targets)} queries")
    wanted = torch.from_numpy(np.stack([foreground(mask) for mask in targets])).to(logits)
    counted = torch.from_numpy(np.stack([~ignored(mask) for mask in targets])).to(logits)
    each = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * counted
    shown = logits.sigmoid() * counted
    overlap, total = (shown * wanted).sum((1, 2)), shown.sum((1, 2)) + wanted.sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return (each.sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)).mean(), dice.mean()
