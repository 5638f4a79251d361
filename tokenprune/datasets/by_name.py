"""From text to a dataset: a name, "name:PATH" where it is read from the user's files, or "module:Class"."""

from __future__ import annotations

import re
from typing import Any

from tokenprune.core.by_name import parse_options
from tokenprune.datasets.base import Dataset
from tokenprune.datasets.by_path import dataset_at, refuse_dotted
from tokenprune.datasets.files.path_dataset import PathDataset
from tokenprune.errors import OptionError, PluginError, UnknownNameError, nearest
from tokenprune.plugins import registry
from tokenprune.utils.arguments import instance
from tokenprune.utils.files import expanded


def dataset(name: str, **options: Any) -> Dataset:
    """A dataset by name.

    Args:
        name: a name of `tokenprune.datasets()`; "name:PATH" for a dataset that is read from files, which options may
            follow, as in "refcocog:/data/refer_seg,splitby=umd"; or "module:Class" (see
            `tokenprune.datasets.by_path`).
        options: fields of the dataset's `Options`.

    Raises:
        UnknownNameError: no such dataset.
        OptionError: no path for a dataset that is read from files, a path or options for another one, an unknown
            option, or one that is given twice.
        InputError: there is nothing at the path.
        PluginError: the dataset cannot be imported or instantiated.

    Examples:
        >>> import tokenprune as tp
        >>> tp.dataset("shapes").splits
        ('train', 'val', 'test', 'heldout')
    """
    instance("dataset", name, str, "the name of a dataset, such as 'shapes'")
    known = registry.datasets()
    head, colon, rest = name.partition(":")
    if name in known:
        head, colon, rest = name, "", ""
    if colon and head not in known:
        if options:
            raise OptionError(f"dataset {name!r} takes no options, found {', '.join(options)}; leave them out")
        if not (rest.isidentifier() or head.endswith(".py")) and nearest(head, known):  # a path, not a class
            raise UnknownNameError.among("dataset", head, known)
        return _with_splits(dataset_at(name), name)
    if head not in known:
        if expanded(name).is_dir():
            raise UnknownNameError(f"dataset {name!r} is a folder; say before it what reads it, as in folder:{name}")
        refuse_dotted(head)
    entry = registry.get("datasets", head)
    kind = entry.load()
    if not issubclass(kind, PathDataset):
        if colon or options:
            found = f"path {rest!r}" if colon else f"options {', '.join(options)}"
            raise OptionError(f"dataset {head!r} takes no path and no options, found {found}; give its name alone")
        made: Dataset = entry.call()
        return _with_splits(made, head)
    path, written = split_path(rest)
    if not path:
        raise OptionError(f"dataset {head!r} is read from files: give their place, as in {head}:/data/{head}")
    given = parse_options(written)
    for option in given.keys() & options.keys():
        raise OptionError(f"dataset {head!r}: option {option!r} is given twice; give it once")
    with entry.running():
        read: Dataset = kind(path, name=head, **given, **options)
    return _with_splits(read, head)


def split_path(text: str) -> tuple[str, list[str]]:
    """A path and the options written behind it: "/data/a,b,splitby=umd" is "/data/a,b" and ["splitby=umd"]."""
    parts = re.split(r",(?=\s*[A-Za-z_][A-Za-z0-9_-]*=)", text)
    return parts[0].strip(), [part.strip() for part in parts[1:]]


def _with_splits(data: Dataset, name: str) -> Dataset:
    splits = getattr(data, "splits", None)
    if isinstance(splits, (tuple, list)) and all(isinstance(split, str) for split in splits):
        return data
    problem = f"has splits {splits!r}, expected a tuple of names such as ('val',)"
    entry = registry.datasets().get(name)
    raise PluginError(f"dataset {name!r} {problem}") if entry is None else entry.refusal(problem)
