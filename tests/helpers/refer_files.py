"""Writes small datasets in REFER's layout: drawn pictures, instances.json, and refs(...).p as Python 2 wrote them."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # x0, y0, x1, y1

SIZES = {581857: (40, 60), 12: (48, 36), 7: (32, 32)}  # height, width by image id
# Boxes of each annotation's parts; those of 103 overlap, those of 104 do not.
PARTS: dict[int, list[Box]] = {
    101: [(2, 3, 20, 30)],
    102: [(30, 5, 58, 25)],
    103: [(4, 4, 20, 24), (12, 16, 34, 40)],
    104: [(1, 1, 8, 12), (20, 30, 30, 45)],
    105: [(0, 0, 32, 10)],
    106: [(5, 12, 12, 30)],
    107: [(20, 15, 31, 31)],
}
IMAGE_OF = {101: 581857, 102: 581857, 103: 12, 104: 12, 105: 7, 106: 7, 107: 7}


def box_mask(boxes: list[Box], size: tuple[int, int]) -> np.ndarray:
    """int [H, W]: how many boxes cover each pixel."""
    covered = np.zeros(size, dtype=int)
    for x0, y0, x1, y1 in boxes:
        covered[y0:y1, x0:x1] += 1
    return covered


def polygon(box: Box) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths, the counts a text, as refclef has them."""
    from pycocotools import mask as coder

    packed = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": packed["counts"].decode()}


def annotation(id: int, segmentation: Any = None, **fields: Any) -> dict[str, Any]:
    boxes = PARTS[id]
    return {
        "segmentation": [polygon(box) for box in boxes] if segmentation is None else segmentation,
        "area": 1.5,
        "iscrowd": 0,
        "image_id": IMAGE_OF[id],
        "bbox": [1.0, 2.0, 3.0, 4.0],
        "category_id": 1,
        "id": id,
    } | fields


def annotations() -> list[dict[str, Any]]:
    """All of them; 106 is a list of run lengths, 107 a crowd."""
    found = [annotation(id) for id in PARTS if id < 106]
    for id in (106, 107):
        mask = box_mask(PARTS[id], SIZES[IMAGE_OF[id]])
        runs = run_lengths(mask)
        found.append(annotation(id, [runs]) if id == 106 else annotation(id, runs, iscrowd=1))
    return found


def ref(id: int, ann_id: Any, split: str, *sentences: str, image_id: int | None = None) -> dict[str, Any]:
    """A reference; its sentences have the ids 10·id, 10·id + 1, …"""
    if image_id is None:
        image_id = IMAGE_OF[ann_id[0] if isinstance(ann_id, list) else ann_id]
    ids = [10 * id + number for number in range(len(sentences))]
    return {
        "sent_ids": ids,
        "file_name": f"COCO_train2014_{image_id:012d}_{id}.jpg",
        "ann_id": ann_id,
        "ref_id": id,
        "image_id": image_id,
        "split": split,
        "sentences": [
            {"tokens": text.lower().split(), "raw": text.upper(), "sent_id": sent, "sent": text}
            for sent, text in zip(ids, sentences, strict=True)
        ],
        "category_id": 1,
    }


def refs() -> list[dict[str, Any]]:
    """Two images in "val", of which the refs are mixed; one each in "testA" and "train"."""
    return [
        ref(0, 101, "val", "the Lady with the blue shirt", " left one "),
        ref(3, 103, "val", "two boxes"),
        ref(1, 102, "val", "right box"),
        ref(2, 105, "testA", "top bar", "the bar", "bar at top"),
        ref(4, 104, "train", "small pieces"),
        ref(5, 106, "testA", "thin one"),
    ]


def grefs() -> list[dict[str, Any]]:
    """No target, one, several, and one beside a crowd."""
    return [
        ref(0, [101, 102], "val", "both people"),
        ref(1, [-1], "val", "the elephant", image_id=581857),
        ref(2, [103], "val", "Two boxes"),
        ref(3, [105, 107], "testA", "bar and crowd"),
        ref(4, [], "testB", "nobody", image_id=7),
    ]


def write_refer(
    root: Path,
    name: str = "refcoco",
    splitby: str = "unc",
    references: list[dict[str, Any]] | None = None,
    found: list[dict[str, Any]] | None = None,
    images_at: str = "images/mscoco/images/train2014",
    python: int = 2,
) -> Path:
    """Write `root`/`name` and the images; returns `root`.

    Args:
        root: like `refer_seg`; created.
        name: of the dataset.
        splitby: of the list of references.
        references: by default `refs()`, for grefcoco `grefs()`.
        found: the annotations, by default `annotations()`.
        images_at: where the images are, below `root`.
        python: whose pickle to write, 2 or 3.
    """
    several = name == "grefcoco"
    references = (grefs() if several else refs()) if references is None else references
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    packed = python2_pickle(references) if python == 2 else pickle.dumps(references)
    (folder / f"{'grefs' if several else 'refs'}({splitby}).p").write_bytes(packed)
    images = [
        {"license": 1, "file_name": file_name(id), "coco_url": "", "height": size[0], "width": size[1], "id": id}
        for id, size in SIZES.items()
    ]
    found = annotations() if found is None else found
    held = {"info": {}, "images": images, "licenses": [], "annotations": found, "categories": []}
    (folder / "instances.json").write_text(json.dumps(held))
    place = root / images_at
    place.mkdir(parents=True, exist_ok=True)
    for id, (height, width) in SIZES.items():
        pixels = np.random.default_rng(id).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / file_name(id))
    return root


def file_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def python2_pickle(value: Any) -> bytes:
    """A pickle of protocol 2 as Python 2's `cPickle` writes it: texts that are ASCII or bytes are its `str`."""
    return b"\x80\x02" + _python2(value, [0]) + b"."


def _python2(value: Any, memo: list[int]) -> bytes:
    def kept(code: bytes) -> bytes:
        memo[0] += 1
        number = memo[0]
        return code + (b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number))

    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        if 0 <= value < 65536:
            return b"M" + struct.pack("<H", value)
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str) and not value.isascii():  # unicode
        text = value.encode(errors="surrogatepass")
        return kept(b"X" + struct.pack("<I", len(text)) + text)
    if isinstance(value, (str, bytes)):  # str
        text = value.encode() if isinstance(value, str) else value
        short = len(text) < 256
        return kept((b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<I", len(text))) + text)
    if isinstance(value, list):
        start = kept(b"]")
        return start + (b"(" + b"".join(_python2(item, memo) for item in value) + b"e" if value else b"")
    if isinstance(value, dict):
        start = kept(b"}")
        items = b"".join(_python2(key, memo) + _python2(item, memo) for key, item in value.items())
        return start + (b"(" + items + b"u" if value else b"")
    raise TypeError(type(value))
