"""Reading of checkpoint folders, sharded or not, .bin or safetensors, one tensor at a time."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tokenprune.errors import CheckpointError
from tokenprune.loading.checkpoints import quiet_hub
from tokenprune.loading.lora_folders import ADAPTER_CONFIG
from tokenprune.utils.files import expanded
from tokenprune_adapters.common.shards import tensors_of_shards

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SMALL_FILES = ["*.json", "*.model", "merges.txt"]
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
SMALL_WEIGHTS = ["adapter_model.*", "non_lora_trainables.bin"]
_UNREADABLE = (RuntimeError, EOFError, ValueError, OSError, KeyError, pickle.UnpicklingError, SafetensorError)


def resolve_folder(name_or_path: str | Path, what: str = "checkpoint", advice: str = "") -> Path:
    """The local folder of a checkpoint: the path itself, or a download of the hub repository of that name.

    Raises:
        CheckpointError: no such folder, and the hub lacks it or cannot be reached. The message ends with `advice`.
    """
    path = expanded(name_or_path)
    if path.is_dir():
        return path
    hint = advice or "give the path of a local folder"
    if path.exists():
        raise CheckpointError(f"{what} {str(path)!r} is a file, expected the folder that contains it; {hint}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name_or_path)):
        raise CheckpointError(f"{what} {str(name_or_path)!r}: no such folder; {hint}")
    try:
        with quiet_hub():
            return _download(str(name_or_path))
    except Exception as error:  # the hub client raises many types: offline, not found, no access, …
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{what} {str(name_or_path)!r}: no such folder, and it could not be fetched from the hub ({reason}); {hint}"
        ) from error


def _download(name: str) -> Path:
    import huggingface_hub

    # Many repositories contain the weights in both formats; safetensors at the top level are preferred.
    small = Path(huggingface_hub.snapshot_download(name, allow_patterns=SMALL_FILES))
    try:
        listed = huggingface_hub.list_repo_files(name)
    except Exception:  # offline: use what was downloaded before
        return small
    safe = any(
        file.startswith("model") and file.endswith((".safetensors", ".safetensors.index.json")) for file in listed
    )
    weights = [f"*.{'safetensors' if safe else 'bin'}", *(SMALL_WEIGHTS if ADAPTER_CONFIG in listed else [])]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*SMALL_FILES, *weights]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing or damaged, or does not contain an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; a checkpoint folder needs one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} contains a JSON {type(found).__name__}, expected an object; fetch it again")
    return found


class Checkpoint:
    """The tensors of a folder by name, read on demand.

    A file is opened when the first of its tensors is read. `.bin` files are read with `weights_only=True`,
    memory-mapped if their format allows it.

    Args:
        folder: folder of the files.
        files: candidate file names, of which the first that exists is read. By default the standard names, with an
            index or, if no shard is missing, without.

    Raises:
        CheckpointError: at construction, if the folder contains no weight file, a shard is missing or two contain the
            same tensor; when reading, if a file is damaged or lacks a tensor that its index lists.
    """

    def __init__(self, folder: Path, files: Sequence[str] = ()) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._files = self._locate() if not files else self._from_file(files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str, dims: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor, which must have `dims` dimensions if given; does not read its values."""
        file = self._file_of(name)
        reader = self._reader(file)
        with _damage_named(self.folder / file):
            found = tuple(reader[name].shape if isinstance(reader, dict) else reader.get_slice(name).get_shape())
        if dims is not None and len(found) != dims:
            _refuse(self, "mis-shaped", [f"{name} with shape {list(found)}, expected {dims} dimensions"])
        return found

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored."""
        file = self._file_of(name)
        reader = self._reader(file)
        with _damage_named(self.folder / file):
            found: Tensor = reader[name] if isinstance(reader, dict) else reader.get_tensor(name)
        return found

    def _file_of(self, name: str) -> str:
        if name not in self._files:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is missing; the checkpoint is incomplete or of another model family"
            )
        return self._files[name]

    def _from_file(self, files: Sequence[str]) -> dict[str, str]:
        single = next((file for file in files if (self.folder / file).is_file()), files[0])
        return dict.fromkeys(self._reader(single).keys(), single)

    def _locate(self) -> dict[str, str]:
        for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
            if (self.folder / index).is_file():
                return self._from_index(index)
            if (self.folder / single).is_file():
                return self._from_file([single])
        found = tensors_of_shards(self.folder, lambda file: self._reader(file).keys())
        if not found:
            raise CheckpointError(
                f"{self.folder} contains no weights; expected one of {', '.join(SINGLE_FILES + INDEX_FILES)} in it"
            )
        return found

    def _from_index(self, index: str) -> dict[str, str]:
        files = read_json(self.folder / index).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{self.folder / index} has no 'weight_map'; fetch the file again")
        for file in sorted(set(files.values())):
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder / index} names {file}, which is missing; fetch that file too")
        # Include tensors that the index does not list, so that none is silently ignored.
        found = dict(files)
        for file in sorted(set(files.values())):
            for name in self._reader(file).keys():  # noqa: SIM118  a safetensors reader is no mapping
                found.setdefault(name, file)
        return found

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            with _damage_named(path):
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt")
                else:
                    self._open[file] = _load_bin(path)
            reader = self._open[file]
            if isinstance(reader, dict):
                others = [name for name, value in reader.items() if not isinstance(value, Tensor)]
                if others:
                    raise CheckpointError(
                        f"{path} contains {others[0]!r}, which is not a tensor; expected a plain state dict"
                    )
        return self._open[file]


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"a {type(loaded).__name__} instead of a state dict")
    return loaded


class _damage_named:
    """Converts exceptions of a reader into a CheckpointError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _UNREADABLE):
            reason = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
            size = self.path.stat().st_size if self.path.exists() else 0
            raise CheckpointError(
                f"{self.path} ({size} bytes) is truncated or damaged ({reason}); fetch the file again"
            ) from error


ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Part(Generic[ModuleT]):
    """A module on the meta device, and the name in the checkpoint of each of its parameters.

    Parameters with the same name become copies of one tensor.
    """

    module: ModuleT
    names: Mapping[str, str]


def load_parts(
    checkpoint: Checkpoint,
    parts: Sequence[Part[Any]],
    dtype: torch.dtype,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load modules from a checkpoint, without a second copy of the weights.

    Everything is checked before the first tensor is read: each parameter must have a tensor of its shape, and each
    tensor of the checkpoint must be used or ignored.

    Args:
        checkpoint: the checkpoint.
        parts: modules on the meta device; their parameters are replaced.
        dtype: dtype that floating-point tensors are converted to.
        ignore: whether a tensor of that name may be unused.

    Raises:
        CheckpointError: tensors are missing, mis-shaped or unexpected; the message names up to three and counts all.
    """
    expected = {
        source: tuple(tensor.shape)
        for part in parts
        for name, tensor in part.module.state_dict().items()
        for source in [part.names[name]]
    }
    missing = [name for name in expected if name not in checkpoint]
    _refuse(checkpoint, "missing", missing)
    extra = [name for name in checkpoint.names() if name not in expected and not ignore(name)]
    _refuse(checkpoint, "unexpected", extra)
    found = {source: checkpoint.shape(source) for source in expected}
    wrong = [
        f"{source} with shape {list(found[source])}, expected {list(shape)}"
        for source, shape in expected.items()
        if found[source] != shape
    ]
    _refuse(checkpoint, "mis-shaped", wrong)
    for part in parts:
        kinds = part.module.state_dict()
        state = {name: _read(checkpoint, source, kinds[name], dtype) for name, source in part.names.items()}
        part.module.load_state_dict(state, strict=True, assign=True)


def _read(checkpoint: Checkpoint, name: str, kind: Tensor, dtype: torch.dtype) -> Tensor:
    found = checkpoint.tensor(name)
    if kind.is_floating_point() != found.is_floating_point():
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is stored as {str(found.dtype).removeprefix('torch.')}, expected "
            "floating-point numbers; if it is quantised, use the checkpoint that it was made from"
        )
    return found.to(dtype) if found.is_floating_point() else found


_MEANING = {
    "missing": "the checkpoint is incomplete",
    "unexpected": "the checkpoint is of another model family or version",
    "mis-shaped": "config.json does not match the weights",
}


def _refuse(checkpoint: Checkpoint, problem: str, found: list[str]) -> None:
    if not found:
        return
    count = "1 tensor is" if len(found) == 1 else f"{len(found)} tensors are"
    shown = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
    raise CheckpointError(f"{checkpoint.folder}: {count} {problem}: {shown}; {_MEANING[problem]}")
