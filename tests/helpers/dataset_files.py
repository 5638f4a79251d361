"""Small datasets in the exact formats of their files: rectangles on plain images, whose masks are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels: columns x0 … x1 - 1, rows y0 … y1 - 1
WIDTH, HEIGHT = 40, 30
EXIF_ORIENTATION = 0x0112


def filled(*rectangles: Rectangle, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.bool_]:
    """The union of rectangles, by plain indexing."""
    mask = np.zeros((height, width), dtype=np.bool_)
    for x0, y0, x1, y1 in rectangles:
        mask[y0:y1, x0:x1] = True
    return mask


def corners(rectangle: Rectangle) -> list[list[float]]:
    """Its corners as labelme lists them."""
    x0, y0, x1, y1 = rectangle
    return [[float(x0), float(y0)], [float(x1), float(y0)], [float(x1), float(y1)], [float(x0), float(y1)]]


def polygon(rectangle: Rectangle) -> list[float]:
    """Its corners as COCO lists them."""
    return [value for point in corners(rectangle) for value in point]


def runs(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed run lengths: column by column, the first of background."""
    flat = mask.flatten(order="F").astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate(([0], flat))))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()}


def compressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Compressed run lengths, as JSON holds them."""
    from pycocotools import mask as coder

    packed = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def image(path: Path, width: int = WIDTH, height: int = HEIGHT, form: str = "colour") -> Path:
    """An image with a gradient whose upright size is width × height.

    Args:
        path: of the file.
        width, height: upright.
        form: "colour", "grey", "CMYK", "16 bits" (PNG), or "turned" (stored on its side, as phones do).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2) % 256
    if form == "16 bits":
        Image.fromarray((ramp * 257).astype(np.uint16)).save(path)
        return path
    picture = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], -1).astype(np.uint8))
    if form == "turned":
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        picture.convert({"colour": "RGB", "grey": "L", "CMYK": "CMYK"}[form]).save(path)
    return path


def shape(label: str, rectangle: Rectangle) -> dict[str, Any]:
    """A shape of ReasonSeg."""
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": "x.jpg",
        "points": corners(rectangle),
        "group_id": None,
        "flags": {},
    }


def reasonseg_entry(
    folder: Path,
    stem: str,
    shapes: Sequence[Mapping[str, Any]],
    texts: Sequence[str] = ("the thing that holds water",),
    *,
    is_sentence: bool = True,
    encoding: str = "utf-8",
    form: str = "colour",
) -> Path:
    """NAME.jpg and NAME.json of ReasonSeg; returns the second."""
    image(folder / f"{stem}.jpg", form=form)
    file = folder / f"{stem}.json"
    record = {"text": list(texts), "is_sentence": is_sentence, "shapes": list(shapes)}
    file.write_bytes(json.dumps(record, ensure_ascii=False).encode(encoding))
    return file


BIG, SMALL, INSIDE = (2, 3, 30, 20), (5, 6, 12, 11), (7, 7, 10, 10)


def reasonseg(root: Path) -> Path:
    """ReasonSeg with a split val of six images and a split test of one; returns the folder of the splits."""
    folder = root / "ReasonSeg" / "val"
    text = "something that protects from the rain – “where is it?”"
    reasonseg_entry(folder, "a-plain", [shape("target", BIG)], [text, "the umbrella, said otherwise"])
    reasonseg_entry(folder, "b-old-encoding", [shape("target", SMALL)], [text], encoding="cp1252", form="turned")
    order = [shape("target", INSIDE), shape("Ignore this", SMALL), shape("target", BIG), shape("FLAG", (0, 0, 40, 30))]
    reasonseg_entry(folder, "c-in-each-other", order, ["the ring"], is_sentence=False, form="grey")
    reasonseg_entry(folder, "d-all-ignored", [shape("ignore", SMALL), shape("target", INSIDE), shape("ignore", INSIDE)])
    reasonseg_entry(folder, "e-nothing", [shape("flag", SMALL)], form="CMYK")
    reasonseg_entry(folder, "f-two", [shape("target", SMALL), shape("target", (20, 15, 25, 28))])
    reasonseg_entry(root / "ReasonSeg" / "test", "t", [shape("target", SMALL)])
    return root / "ReasonSeg"


def coco_annotation(id: int, image: int, category: int, segmentation: Any, **fields: Any) -> dict[str, Any]:
    """An annotation of COCO; area and bbox are not read."""
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
        "area": 1.0,
        "bbox": [0, 0, 1, 1],
        **fields,
    }


LEFT, RIGHT, CROWD = (2, 3, 10, 12), (20, 5, 31, 19), (25, 10, 38, 28)


def coco(root: Path, annotations: Sequence[Mapping[str, Any]] | None = None, name: str = "instances_val.json") -> Path:
    """A file in COCO's format with three images in `images` beside it; returns the file.

    Image 1 has two dogs (polygons in two parts, compressed run lengths), a crowd of dogs over the second, and a cat
    (uncompressed run lengths); image 2 has a crowd alone, image 3 a cat.
    """
    listed = annotations
    if listed is None:
        listed = [
            coco_annotation(11, 1, 18, [polygon(LEFT), polygon((12, 3, 14, 12))]),
            coco_annotation(12, 1, 18, compressed(filled(RIGHT))),
            coco_annotation(13, 1, 17, runs(filled((0, 20, 9, 30)))),
            coco_annotation(14, 1, 18, runs(filled(CROWD)), iscrowd=1),
            coco_annotation(15, 2, 18, runs(filled(CROWD)), iscrowd=1),
            coco_annotation(16, 3, 17, [polygon(SMALL)]),
        ]
    images = []
    for number, form in ((1, "colour"), (2, "grey"), (3, "colour")):
        image(root / "images" / f"{number:012d}.jpg", form=form)
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": HEIGHT, "width": WIDTH})
    categories = [{"id": 17, "name": "cat", "supercategory": "animal"}, {"id": 18, "name": "dog"}]
    file = root / name
    file.write_text(json.dumps({"images": images, "annotations": list(listed), "categories": categories}))
    return file


def muse(root: Path) -> Path:
    """MUSE: muse_val.json with three images of the three subsets of COCO; returns the folder."""

    def answer(segmentation: Any) -> dict[str, Any]:
        return {"segmentation": segmentation, "bbox": [0, 0, 1, 1], "category_name": "x", "rephrased_name": "the x"}

    images = root / "refer_seg" / "images" / "mscoco" / "images"
    image(images / "train2014" / "COCO_train2014_000000000001.jpg")
    image(images / "train2017" / "000000000002.jpg", form="grey")
    image(images / "val2017" / "000000000003.jpg")
    one, two = answer([polygon(LEFT), polygon((8, 8, 15, 15))]), answer(compressed(filled(RIGHT)))
    size = {"height": HEIGHT, "width": WIDTH, "ann_list": [one, two]}
    url = "http://images.cocodataset.org"
    entries = [
        {
            "file_name": "COCO_train2014_000000000001.jpg",
            "questions": ["What could one sit on?", "What are the two?"],
            "answers": [[one], [one, two]],
            **size,
        },
        {"coco_url": f"{url}/train2017/000000000002.jpg", "questions": ["Which one?"], "answers": [[two]], **size},
        {"coco_url": f"{url}/val2017/000000000003.jpg", "questions": ["Any cat?"], "answers": [[]], **size},
    ]
    (root / "muse_val.json").write_text(json.dumps(entries))
    return root


def folder(root: Path, name: str = "queries.csv") -> Path:
    """Images and masks with a table of four queries about three images, in splits val and test; returns the folder."""
    forms = {"a.jpg": "colour", "b.png": "16 bits", "c.jpg": "turned"}
    for file, form in forms.items():
        image(root / "images" / file, form=form)
    masks = {"left": LEFT, "right": RIGHT, "none": (0, 0, 0, 0)}
    (root / "masks").mkdir(exist_ok=True)
    for mask, rectangle in masks.items():
        Image.fromarray(filled(rectangle).astype(np.uint8) * 255).save(root / "masks" / f"{mask}.png")
    rows = [
        ("images/a.jpg", "masks/left.png", "the left, lower one", "thing", "first", "val", "false"),
        ("images/b.png", "masks/none.png", 'a "red" dog', "absent", "second", "val", "no"),
        ("images/a.jpg", "masks/right.png", "Where would one\nsit?", "thing", "third", "val", "true"),
        ("images/c.jpg", "masks/right.png", "der Stuhl, größer", "thing", "fourth", "test", ""),
    ]
    columns = ("image", "mask", "query", "kind", "id", "split", "is_sentence")
    if name.endswith(".jsonl"):
        truth = {"true": True, "false": False, "no": False, "": False}
        lines = [{**dict(zip(columns, row, strict=True)), "is_sentence": truth[row[-1]]} for row in rows]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (root / name).write_text(f"{text}\n", encoding="utf-8")
        return root
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    (root / name).write_bytes("\r\n".join([",".join(columns), *quoted, ""]).encode("utf-8-sig"))
    return root
