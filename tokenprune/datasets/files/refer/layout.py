"""Where the files of REFER are: the dataset's folder, its lists of references, and the images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenprune.errors import InputError
from tokenprune.utils.files import expanded

INSTANCES = "instances.json"
NAMES = ("refcoco", "refcoco+", "refcocog", "refclef", "grefcoco")


def folder_of(path: Path, name: str, lists: Sequence[str]) -> Path:
    """The folder with a dataset's files: `path`, or the folder `name` in it.

    Args:
        path: what the user gave.
        name: of the dataset.
        lists: names that its list of references may have: "refs(unc).p".

    Raises:
        InputError: neither holds a list or instances.json, or the folder is that of another dataset.
    """
    for folder in (path / name, path):
        if any(os.path.isfile(folder / file) for file in (*lists, INSTANCES)):
            held = folder.absolute().name
            if held in NAMES and held != name:
                raise InputError(f"dataset {name!r}: {str(folder)!r} is the folder of {held!r}; name that dataset")
            return folder
    wanted = " or ".join(repr(file) for file in lists)
    raise InputError(
        f"dataset {name!r}: neither {str(path / name)!r} nor {str(path)!r} has {wanted} and {INSTANCES!r}; give the "
        f"folder that holds {name}/"
    )


def list_of(folder: Path, name: str, lists: Sequence[str]) -> Path:
    """The file of references, the first of `lists` that is there; raises InputError with those that are."""
    for file in lists:
        if os.path.isfile(folder / file):
            return folder / file
    there = sorted(repr(file.name) for file in folder.glob("*refs(*).*"))
    found = f"which has {', '.join(there)}; choose with the option splitby" if there else "; complete the folder"
    wanted = " or ".join(repr(file) for file in lists)
    raise InputError(f"dataset {name!r}: no {wanted} in {str(folder)!r}" + (", " if there else "") + found)


def images_of(folder: Path, name: str, given: str | Path | None, places: Sequence[str]) -> Path:
    """The folder of the images: the one that the user gave, or the first of `places` beside or above the files.

    Args:
        folder: with the dataset's files.
        name: of the dataset.
        given: what the user gave.
        places: where they may be, below `folder` and the two folders above it.

    Raises:
        InputError: it is not there.
    """
    if given is not None:
        chosen = expanded(given)
        if not os.path.isdir(chosen):
            raise InputError(f"dataset {name!r}: option images is {str(given)!r}, where no folder is; check the path")
        return chosen
    bases = (folder.absolute(), *folder.absolute().parents[:2])
    for place in places:
        for base in bases:
            if os.path.isdir(base / place):
                return base / place
    tried = ", ".join(repr(place) for place in places)
    raise InputError(
        f"dataset {name!r}: no folder of images found; looked for {tried} in {', '.join(str(base) for base in bases)}; "
        "give it with the option images"
    )
