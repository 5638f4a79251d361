"""The first phase: channel means, then the mask head on point prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from runs import Phase
from scenes import Natural, Scene, Strips
from torch import Tensor, nn
from torch.nn import functional

from tokenprune_adapters.photos.parts import MaskHead, Standardise
from tokenprune_adapters.photos.tower import LiteTower

POINTS = 3


class Eyes(nn.Module):
    """Tower, standardised levels and mask head: all that sees pixels."""

    def __init__(self, tower: LiteTower) -> None:
        super().__init__()
        self.tower, self.standardise, self.head = tower, Standardise(), MaskHead()

    @torch.no_grad()
    def levels(self, pixels: np.ndarray) -> list[Tensor]:
        """The standardised levels of a picture, uint8 [H, W, 3]."""
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        levels: list[Tensor] = self.standardise(self.tower(values.contiguous(memory_format=torch.channels_last)))
        return levels

    def masks(self, levels: list[Tensor], points: Tensor) -> Tensor:
        """Mask logits in the picture's size, [n, H, W], of points (x, y) in 0..1."""
        logits = self.head(levels, points)
        larger: Tensor = functional.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
        return larger


def inner_points(rng: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """Points of a mask by chance, moved by up to half a cell: the read-out's are not exact; [count, 2] in 0..1."""
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows), size=count)
    places = np.stack([columns[chosen], rows[chosen]], -1) + 0.5 + rng.uniform(-12, 12, (count, 2))
    return np.clip(places / np.array(mask.shape[::-1]), 0, 1).astype(np.float32)


def head_loss(eyes: Eyes, scene: Scene, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Cross-entropy and dice of some of the scene's things, each from a point; their mean IoU beside it."""
    different = list({asked.target.tobytes(): asked.target for asked in scene.asked}.values())
    order = rng.permutation(len(different))[:POINTS]
    targets = torch.from_numpy(np.stack([different[int(place)] for place in order])).float()
    points = torch.from_numpy(np.concatenate([inner_points(rng, different[int(place)], 1) for place in order]))
    logits = eyes.head(eyes.levels(scene.pixels), points)
    wanted = functional.avg_pool2d(targets[:, None], 4)[:, 0]
    likely = logits.sigmoid()
    dice = 1 - (2 * (likely * wanted).sum((1, 2)) + 1) / (likely.sum((1, 2)) + wanted.sum((1, 2)) + 1)
    hard, true = logits.detach() > 0, wanted > 0.5
    iou = (hard & true).sum((1, 2)) / (hard | true).sum((1, 2)).clamp(min=1)
    return functional.binary_cross_entropy_with_logits(logits, wanted) + dice.mean(), float(iou.mean())


def train_head(work: Path, eyes: Eyes, strips: Strips, natural: Natural, steps: int) -> None:
    """Measure the channels and train the head, or load what an earlier start left; frozen afterwards.

    Args:
        work: folder of checkpoints.
        eyes: whose head is trained.
        strips, natural: training pictures; strips of two are enough.
        steps: optimizer steps.
    """
    channels = work / "channels.pt"
    if not channels.exists():
        rng = np.random.default_rng(5)
        with torch.no_grad():
            eyes.standardise.measure(
                [
                    eyes.tower(torch.from_numpy(strips.scene(rng, 1, True).pixels).permute(2, 0, 1)[None].float() / 255)
                    for _ in range(16)
                ]
            )
        torch.save(eyes.standardise.state_dict(), channels)
    eyes.standardise.load_state_dict(torch.load(channels, weights_only=True))
    trained = dict(eyes.head.named_parameters())
    optimizer = torch.optim.AdamW([{"params": list(trained.values()), "lr": 0.0, "scale": 1.0}], weight_decay=0.01)
    phase = Phase(work, "head", trained, optimizer, every=120)
    small = Strips(strips.photographs, 2)
    while phase.step < steps:
        rng = phase.begin_step(11)
        scene = (natural if rng.random() < 0.35 else small).scene(rng, 6, True)
        loss, iou = head_loss(eyes, scene, rng)
        loss.backward()
        rate = 2e-3 * min(1, (phase.step + 1) / 30) * (1 - 0.97 * phase.step / steps)
        phase.end_step({"loss": float(loss.detach()), "iou": iou}, rate)
        if phase.step == steps:
            phase.log(**phase.averages)
            phase.save()
    eyes.requires_grad_(False).eval()
