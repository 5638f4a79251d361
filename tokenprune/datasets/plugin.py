"""Registers the built-in datasets; imports none of them."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl


@hookimpl
def tokenprune_register_datasets(register: Register) -> None:
    """One that needs no files, and formats of files."""
    register(
        "shapes", "tokenprune.datasets.shapes:Shapes", summary="procedural scenes of shapes, queries of four kinds"
    )
    files = "tokenprune.datasets.files"
    register("reasonseg", f"{files}.reasonseg:ReasonSeg", summary="reasonseg:PATH, reasoning segmentation of LISA")
    register("muse", f"{files}.muse:Muse", summary="muse:PATH, questions for several objects, of PixelLM")
    register("coco", f"{files}.coco:Coco", summary="coco:FILE, queries by category or text in COCO's format")
    register("folder", f"{files}.folder:Folder", summary="folder:PATH, your images and masks, with queries.csv")
