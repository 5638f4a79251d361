"""Shards of a checkpoint without an index; their file names contain their number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenprune.errors import CheckpointError

_SHARD = re.compile(r"((?:pytorch_)?model)-(\d+)-of-(\d+)\.(safetensors|bin)")


def tensors_of_shards(folder: Path, names_in: Callable[[str], Iterable[str]]) -> dict[str, str]:
    """From each tensor's name to its file; empty if the folder contains no shards.

    Args:
        folder: folder of the checkpoint. If it contains both formats, safetensors are used.
        names_in: returns the names of the tensors in a file.

    Raises:
        CheckpointError: a shard is missing, there are shards of two checkpoints, or a tensor is in two shards.
    """
    shards = [match for path in sorted(folder.iterdir()) if (match := _SHARD.fullmatch(path.name))]
    kind = max((match[4] for match in shards), default="")
    wholes = {(match[1], match[3]) for match in shards if match[4] == kind}
    if not wholes:
        return {}
    here = f"{folder} has shards without an index"
    if len(wholes) > 1:
        raise CheckpointError(f"{here}, of {len(wholes)} checkpoints; fetch the index, or keep the shards of one")
    stem, count = wholes.pop()
    found: dict[str, str] = {}
    for number in range(1, int(count) + 1):
        file = f"{stem}-{number:0{len(count)}d}-of-{count}.{kind}"
        if not (folder / file).is_file():
            raise CheckpointError(f"{here}, and {file} is missing; fetch that file too")
        for name in names_in(file):
            if found.setdefault(name, file) != file:
                raise CheckpointError(f"{here}, and both {found[name]} and {file} contain {name}; fetch the index too")
    return found


def has_shards(folder: Path) -> bool:
    """Whether a folder contains a shard of a checkpoint."""
    return any(_SHARD.fullmatch(path.name) for path in folder.iterdir())
