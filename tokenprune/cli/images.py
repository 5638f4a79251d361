"""Which images a command is given, and where what it makes of each is written."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path

from tokenprune.cli.checks import check_image
from tokenprune.cli.printing import note
from tokenprune.errors import BudgetError, EngineError, InputError, PluginError
from tokenprune.report.files import check_distinct, check_target, check_targets
from tokenprune.report.write import writable_folder
from tokenprune.utils.arguments import unicode_problem
from tokenprune.utils.files import expanded, is_url, reason

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

    def targets(self, places: Mapping[str, Path | None]) -> dict[str, list[Path]]:
        """Where the pictures made of each image go: to the place itself for one, to NAME.png in it for many.

        Folders are made.

        Args:
            places: by the option that names them; None = not asked for, and left out of what is given.

        Raises:
            InputError: one cannot be written, would be written over an image, or two pictures over each other.
        """
        asked = {option: place for option, place in places.items() if place is not None}
        if not self.many:
            check_targets(asked, inputs=self.paths)
            return {option: [place] for option, place in asked.items()}
        names = _names(self.paths)
        found = {option: [place / name for name in names] for option, place in asked.items()}
        for place in asked.values():
            _check_folder(place)
        check_distinct(found, self.paths)
        for place in asked.values():
            writable_folder(place)
        for target in chain(*found.values()):
            check_target(target)
        return found


def words(text: str, what: str, images: Sequence[Path]) -> str:
    """What is asked about images, as it was given; UTF-8 where the locale says that arguments are ASCII.

    Args:
        text: the last argument of the command.
        what: "query" or "question", for messages.
        images: the arguments before it.

    Raises:
        InputError: no words, or bytes that are no text; words without an image; words without quotes, the first of
            which stand among the images; or a file: the words were left out, and the last image stands in their place.
    """
    with suppress(UnicodeError):
        text = text.encode(errors="surrogateescape").decode()
    if not text.strip():
        raise InputError(f"{what} is empty; say it in words")
    problem = unicode_problem(text)
    if problem:
        raise InputError(f"{what} {text[:60]!a} {problem}")
    is_there = os.path.exists(expanded(text))
    if not images:
        is_image = is_there or Path(text).suffix.lower() in SUFFIXES or _is_pattern(Path(text))
        missing, cure = (what, f'put it behind the image: {text} "…"') if is_image else ("image", "put it first")
        raise InputError(f"only {text!r} is given: the {missing} is missing; {cure}")
    if is_there:
        raise InputError(f"{what} {text!r} is a file or folder; put the {what}, in words, behind the images")
    loose = list(takewhile(_is_word, reversed(images)))[::-1]
    if loose:
        whole = " ".join([*map(str, loose), text])
        raise InputError(
            f'image {str(loose[0])!r}: no such file; check the path, or put the {what} in quotes: "{whole}"'
        )
    return text


def _is_word(argument: Path) -> bool:
    """Whether an argument may be of a query without quotes: no file, and nothing like the name of one."""
    plain = not argument.suffix and argument.name == str(argument) and not _is_pattern(argument)
    return plain and not str(argument).startswith("~") and not os.path.exists(argument)


def _is_pattern(argument: Path) -> bool:
    return any(sign in str(argument) for sign in "*?[")


def find_images(arguments: Sequence[Path]) -> Images:
    """The images that files, folders and patterns such as "photos/*.jpg" name.

    Raises:
        InputError: a folder or a pattern without any image; a folder that cannot be read; a single file that is not
            there.
    """
    found: list[Path] = []
    many = len(arguments) > 1
    for argument in arguments:
        given = expanded(argument)
        if given.is_dir():
            many = True
            inside = _inside(given)
            if not inside:
                expected = ", ".join(sorted(SUFFIXES))
                raise InputError(f"folder {str(argument)!r} holds no image; expected files that end in {expected}")
            found += inside
        elif not is_url(argument) and _is_pattern(argument) and not given.exists():
            many = True
            matching = _matching(given)
            if not matching:
                raise InputError(f"pattern {str(argument)!r} matches no file; check it, from the folder you are in")
            found += matching
        else:
            found.append(given)
    if not many:
        check_image(found[0])
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
        note(f"error: {told[0]}")


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be read ({reason(error)}); choose another") from error


def _check_folder(place: Path) -> None:
    is_file = expanded(place).is_file()
    if is_file or place.suffix.lower() == ".png":
        found = "is a file" if is_file else "ends in .png, as a file does"
        raise InputError(f"output {str(place)!r} {found}, and there may be several images; name a folder")


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
