"""Colour words of pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLOURS = {
    "black": [(20, 20, 22), (45, 45, 48)],
    "white": [(245, 245, 245), (220, 220, 222)],
    "gray": [(128, 128, 130), (95, 96, 100), (165, 165, 168)],
    "red": [(190, 25, 35), (140, 20, 30), (220, 60, 60)],
    "orange": [(235, 120, 40), (220, 100, 30)],
    "yellow": [(235, 205, 60), (220, 190, 40)],
    "green": [(60, 130, 70), (40, 80, 50), (110, 160, 90), (90, 100, 50)],
    "blue": [(50, 80, 160), (30, 40, 90), (110, 150, 200), (80, 110, 150)],
    "purple": [(110, 60, 140), (80, 40, 90)],
    "pink": [(235, 150, 170), (220, 90, 140), (240, 190, 195)],
    "brown": [(100, 65, 45), (70, 45, 35), (140, 95, 65)],
    "beige": [(215, 195, 165), (190, 165, 130)],
}
"""Examples of each colour word, sRGB (ours)."""


def to_lab(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """CIE L*a*b* (D65) of sRGB values 0..255 [..., 3]."""
    c = rgb.astype(np.float32) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = c @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]], np.float32)
    f = np.cbrt(np.maximum(xyz / np.array([0.9505, 1.0, 1.089], np.float32), 1e-6))
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_WORDS = [word for word, examples in COLOURS.items() for _ in examples]
_EXAMPLES = to_lab(np.array([example for examples in COLOURS.values() for example in examples]))


def colour_shares(pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Which share of the pixels [n, 3] each colour word is nearest to."""
    lab = to_lab(pixels)
    nearest = ((lab[:, None] - _EXAMPLES) ** 2).sum(-1).argmin(-1)
    counts = np.bincount(nearest, minlength=len(_WORDS)) / len(pixels)
    shares: dict[str, float] = {}
    for word, share in zip(_WORDS, counts, strict=True):
        shares[word] = shares.get(word, 0.0) + float(share)
    return shares
