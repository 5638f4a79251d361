"""Registers the built-in datasets; imports none of them."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl

REFER = {
    "refcoco": ("RefCOCO", "phrases for objects in pictures of COCO; refcoco:PATH"),
    "refcoco+": ("RefCOCOPlus", "as refcoco, without words for locations; refcoco+:PATH"),
    "refcocog": ("RefCOCOg", "longer phrases for objects in pictures of COCO; refcocog:PATH"),
    "refclef": ("RefCLEF", "phrases for regions of SAIAPR TC-12 (ReferItGame); refclef:PATH"),
    "grefcoco": ("GRefCOCO", "phrases for one object, several or none (gRefCOCO); grefcoco:PATH"),
}


@hookimpl
def tokenprune_register_datasets(register: Register) -> None:
    """Datasets that need no files, and those that are read from the user's: their name is followed by a path."""
    register(
        "shapes", "tokenprune.datasets.shapes:Shapes", summary="procedural scenes of shapes, queries of four kinds"
    )
    register(
        "shapes-2",
        "tokenprune.datasets.shapes:Shapes2",
        summary="scenes of shapes; in relations the anchor decides",
    )
    register(
        "photo-strips",
        "tokenprune.datasets.strips.dataset:PhotoStrips",
        summary="strips of street photographs, which person?; photo-strips:PATH",
    )
    files = "tokenprune.datasets.files"
    register("reasonseg", f"{files}.reasonseg:ReasonSeg", summary="reasoning segmentation, of LISA; reasonseg:PATH")
    register("muse", f"{files}.muse:Muse", summary="questions with several targets, of PixelLM; muse:PATH")
    register("coco", f"{files}.coco:Coco", summary="COCO's format, queries by category or text; coco:FILE")
    register("folder", f"{files}.folder:Folder", summary="your images and masks, with queries.csv; folder:PATH")
    for name, (kind, summary) in REFER.items():
        register(name, f"{files}.refer.dataset:{kind}", summary=summary)
