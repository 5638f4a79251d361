"""The image files of a command, and where its output for each is written."""

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
from tokenprune.utils.files import IMAGE_SUFFIXES, expanded, is_url, reason


@dataclass(frozen=True)
class Images:
    """Image files, in order, each once.

    Attributes:
        paths: of the files.
        many: whether outputs are folders: several arguments, a folder or a pattern were given (even of one image).
    """

    paths: list[Path]
    many: bool

    def targets(self, places: Mapping[str, Path | None], overwrite: bool = True) -> dict[str, list[Path]]:
        """Paths of the output pictures: the place itself for one image, NAME.png in it for many.

        Folders are made.

        Args:
            places: by option; None = not requested, and left out of the result.
            overwrite: of many images, whether pictures that exist may be replaced.

        Raises:
            InputError: one cannot be written, would overwrite an image, exists although it must not, or two have the
                same path.
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
        if not overwrite:
            _check_absent(found)
        for place in asked.values():
            writable_folder(place)
        for target in chain(*found.values()):
            check_target(target)
        return found


def words(text: str, what: str, images: Sequence[Path]) -> str:
    """The query or question, decoded as UTF-8 if the locale says that arguments are ASCII.

    Args:
        text: the last argument of the command.
        what: "query" or "question", for messages.
        images: the arguments before it.

    Raises:
        InputError: no words, or bytes that are not text; words without an image; words without quotes, so that the
            first ones are among the images; or a file, because the words are missing.
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
        is_image = is_there or Path(text).suffix.lower() in IMAGE_SUFFIXES or _is_pattern(Path(text))
        missing, cure = (what, f'put it after the image: {text} "…"') if is_image else ("image", "put it first")
        raise InputError(f"only {text!r} is given: the {missing} is missing; {cure}")
    if is_there:
        raise InputError(f"{what} {text!r} is a file or folder; put the {what}, in words, after the images")
    loose = list(takewhile(_is_word, reversed(images)))[::-1]
    if loose:
        whole = " ".join([*map(str, loose), text])
        raise InputError(
            f'image {str(loose[0])!r}: no such file; check the path, or put the {what} in quotes: "{whole}"'
        )
    return text


def _is_word(argument: Path) -> bool:
    """Whether an argument may be a word of a query without quotes: not a file, nor like a file name."""
    plain = not argument.suffix and argument.name == str(argument) and not _is_pattern(argument)
    return plain and not str(argument).startswith("~") and not os.path.exists(argument)


def _is_pattern(argument: Path) -> bool:
    return any(sign in str(argument) for sign in "*?[")


def find_images(arguments: Sequence[Path]) -> Images:
    """The images that files, folders and patterns such as "photos/*.jpg" name.

    Raises:
        InputError: a folder or a pattern without any image; a folder that cannot be read; a single file that does not
            exist.
    """
    found: list[Path] = []
    many = len(arguments) > 1
    for argument in arguments:
        given = expanded(argument)
        if given.is_dir():
            many = True
            inside = _inside(given)
            if not inside:
                expected = ", ".join(sorted(IMAGE_SUFFIXES))
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


def listed_images(table: Path) -> tuple[Images, list[str]]:
    """The images that a table of images and queries names, row by row, and the queries.

    Args:
        table: CSV with the columns image and query, or JSON lines (by its suffix) with these keys; other columns of the
            tables of datasets are ignored. Paths are relative to the table's folder.

    Raises:
        InputError: it cannot be read, or a row has no image or no query.
    """
    from tokenprune.datasets.files.query_tables import rows_of

    place = expanded(table)
    rows = rows_of(place, ("image", "query"))
    for row in rows:
        for column in ("image", "query"):
            if not row.get(column).strip():
                raise InputError(
                    f"{row.where}: {column} is empty, expected a {'path' if column == 'image' else 'text'}"
                )
    paths = [place.parent / expanded(row.get("image").strip()) for row in rows]
    return Images(paths, many=True), [row.get("query") for row in rows]


@contextmanager
def unusable(image: Path, images: Images) -> Iterator[list[str]]:
    """Report on stderr why one of many images cannot be used, and continue; the list then holds the message.

    Errors that are not about this image are raised, and with a single image all of them.
    """
    problems: list[str] = []
    try:
        yield problems
    except (InputError, BudgetError, EngineError, PluginError) as error:
        if not images.many:
            raise
        problem = " ".join(str(error).split())
        problems.append(problem if str(image) in problem else f"image {str(image)!r}: {problem}")
        note(f"error: {problems[0]}")


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be read ({reason(error)}); choose another") from error


def _check_folder(place: Path) -> None:
    is_file = expanded(place).is_file()
    if is_file or place.suffix.lower() == ".png":
        found = "is a file" if is_file else "ends in .png, as a file does"
        raise InputError(f"output {str(place)!r} {found}, and there may be several images; name a folder")


def _check_absent(targets: Mapping[str, Sequence[Path]]) -> None:
    for option, paths in targets.items():
        there = [path for path in paths if os.path.lexists(expanded(path))]
        if there:
            more = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
            raise InputError(
                f"{option}: {str(there[0])!r}{more} already; choose another folder, or replace with --overwrite"
            )


def _matching(pattern: Path) -> list[Path]:
    return sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())


def _names(paths: Sequence[Path]) -> list[str]:
    """NAME.png for NAME.jpg; NAME.jpg.png if two would be equal, then NAME.jpg-2.png."""
    stems = [path.stem.lower() for path in paths]  # some file systems ignore case
    wanted = [path.stem if stems.count(path.stem.lower()) == 1 else path.name for path in paths]
    used: set[str] = set()
    for number, name in enumerate(wanted):
        again = 1
        while wanted[number].lower() in used:
            again += 1
            wanted[number] = f"{name}-{again}"
        used.add(wanted[number].lower())
    return [f"{name}.png" for name in wanted]
