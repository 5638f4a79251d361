"""Which images a command is given, and where what it makes of each is written."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from tokenprune.errors import BudgetError, EngineError, InputError, PluginError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What of a folder counts as an image; files that are named are tried whatever their suffix."""


@dataclass(frozen=True)
class Images:
    """Image files, in order, each once.

    Attributes:
        paths: of the files.
        many: whether outputs are folders: several arguments, a folder or a pattern were given, though it may hold one.
    """

    paths: list[Path]
    many: bool

    def targets(self, out: Path) -> list[Path]:
        """Where the picture made of each image goes: `out` itself for one, `out`/NAME.png for many; names differ.

        Raises:
            InputError: it would be written over one of the images.
        """
        found = [out / name for name in _names(self.paths)] if self.many else [out]
        taken = {path.resolve() for path in self.paths}
        for target in found:
            if target.expanduser().resolve() in taken:
                raise InputError(f"output {str(target)!r} is one of the images; choose another path")
        return found


def words(text: str, what: str) -> str:
    """What is asked about images, as it was given.

    Args:
        text: the last argument of the command.
        what: "query" or "question", for messages.

    Raises:
        InputError: no words, or a file: the words were left out, and the last image stands in their place.
    """
    if not text.strip():
        raise InputError(f"{what} is empty; say it in words")
    if os.path.exists(os.path.expanduser(text)):
        raise InputError(f"{what} {text!r} is a file or folder; put the {what}, in words, behind the images")
    return text


def find_images(arguments: Sequence[Path]) -> Images:
    """The images that files, folders and patterns such as "photos/*.jpg" name.

    Raises:
        InputError: a folder or a pattern without any image; a folder that cannot be read; a single file that is not
            there.
    """
    found: list[Path] = []
    many = len(arguments) > 1
    for argument in arguments:
        given = Path(os.path.expanduser(argument))
        if given.is_dir():
            many = True
            inside = _inside(given)
            if not inside:
                expected = ", ".join(sorted(SUFFIXES))
                raise InputError(f"folder {str(argument)!r} holds no image; expected files that end in {expected}")
            found += inside
        elif any(sign in argument.name or sign in str(argument.parent) for sign in "*?[") and not given.exists():
            many = True
            matching = _matching(given)
            if not matching:
                raise InputError(f"pattern {str(argument)!r} matches no file; check it, from the folder you are in")
            found += matching
        else:
            found.append(given)
    if not many and not found[0].exists():
        raise InputError(f"image {str(found[0])!r}: no such file; check the path")
    return Images(list(dict.fromkeys(found)), many)


@contextmanager
def unusable(image: Path, images: Images) -> Iterator[list[str]]:
    """Tell on stderr, with its name, what one of many images cannot be used for, and go on; the list then holds it.

    Errors that are not of this image alone go on to the caller, as all do where there is only one.
    """
    told: list[str] = []
    try:
        yield told
    except (InputError, BudgetError, EngineError, PluginError) as error:
        if not images.many:
            raise
        problem = " ".join(str(error).split())
        told.append(problem if str(image) in problem else f"image {str(image)!r}: {problem}")
        typer.echo(f"error: {told[0]}", err=True)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be read ({error.strerror}); choose another") from error


def _matching(pattern: Path) -> list[Path]:
    return sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())


def _names(paths: Sequence[Path]) -> list[str]:
    """NAME.png of NAME.jpg; NAME.jpg.png where two would be alike, then NAME.jpg-2.png, so that none is lost."""
    stems = [path.stem.lower() for path in paths]  # some file systems know no capitals
    wanted = [path.stem if stems.count(path.stem.lower()) == 1 else path.name for path in paths]
    used: set[str] = set()
    for number, name in enumerate(wanted):
        again = 1
        while wanted[number].lower() in used:
            again += 1
            wanted[number] = f"{name}-{again}"
        used.add(wanted[number].lower())
    return [f"{name}.png" for name in wanted]
