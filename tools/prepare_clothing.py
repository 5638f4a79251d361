"""Prepare Clothing Co-Parsing for the dataset photo-strips: `python tools/prepare_clothing.py CLONE FOLDER`.

CLONE is a clone of https://github.com/bearpaw/clothing-co-parsing. Its 1004 photographs with labels for pixels are
written into FOLDER, longest side 384 pixels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from scipy.io import loadmat

LONGEST = 384


def prepare(clone: Path, folder: Path) -> None:
    """Write photos/NNNN.jpg, labels/NNNN.png and labels.json."""
    for name in ("photos", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for file in sorted((clone / "annotations" / "pixel-level").glob("*.mat")):
        photo = Image.open(clone / "photos" / f"{file.stem}.jpg").convert("RGB")
        photo.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS, reducing_gap=None)
        photo.save(folder / "photos" / f"{file.stem}.jpg", quality=85)
        labels = Image.fromarray(loadmat(file)["groundtruth"]).resize(photo.size, Image.Resampling.NEAREST)
        labels.save(folder / "labels" / f"{file.stem}.png")
    names = [str(cell[0]) for cell in loadmat(clone / "label_list.mat")["label_list"][0]]
    (folder / "labels.json").write_text(json.dumps(names, indent=0))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="prepare_clothing", description=__doc__)
    parser.add_argument("clone", type=Path, help="with annotations, photos and label_list.mat")
    parser.add_argument("folder", type=Path, help="to write")
    options = parser.parse_args()
    if not (options.clone / "label_list.mat").is_file():
        parser.error(f"{options.clone} has no label_list.mat; clone https://github.com/bearpaw/clothing-co-parsing")
    prepare(options.clone, options.folder)


if __name__ == "__main__":
    main()
