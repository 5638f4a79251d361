"""Finds the checkpoint of a model's name, and reads its config.json; weights are not loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import CheckpointError, nearest
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, base_of
from tokenprune.plugins import registry
from tokenprune.utils.arguments import instance
from tokenprune.utils.files import expanded

if TYPE_CHECKING:
    from tokenprune.plugins.entries import Entry


def find_checkpoint(name_or_path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """The folder or hub id of a model's name, and its config.json; weights are not loaded.

    Raises:
        OptionError: no name.
        CheckpointError: there is no such checkpoint.
        PluginError: a bundled model's folder does not exist.
    """
    wanted = "a bundled model's name, a checkpoint's folder, or a hub id"
    source = str(instance("name_or_path", name_or_path, (str, Path), wanted))
    bundled = registry.models()
    if source in bundled:
        source = str(_folder(bundled[source]))
    return source, _read_config(source, list(bundled))


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a hub repository id."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith("/")


def _folder(bundled: Entry) -> Path:
    found = bundled.call()
    if not isinstance(found, (str, Path)) or not Path(found).is_dir():
        raise bundled.refusal(f"gave {str(found)!r}, expected its checkpoint's folder", "reinstall the package")
    return Path(found)


def _read_config(source: str, bundled: list[str]) -> Mapping[str, Any]:
    folder = expanded(source)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            path = _config_of_base(source, folder)
    elif folder.is_file():
        raise CheckpointError(f"{source}: found a file, expected a checkpoint's folder; pass the folder that holds it")
    else:
        path = _download_config(source, bundled)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: found {type(config).__name__}, expected a JSON object; fetch the checkpoint again"
        )
    return config


def _config_of_base(source: str, folder: Path) -> Path:
    """The config.json of the base model of a folder with an adapter (LoRA)."""
    base = base_of(folder)
    if base is None:
        raise CheckpointError(f"{source}: found no config.json in this folder, expected a checkpoint's folder")
    cure = f"put the base model there, or correct base_model_name_or_path in its {ADAPTER_CONFIG}"
    if Path(base) == folder:
        raise CheckpointError(f"{source} holds an unmerged adapter and names no base model; {cure}")
    path = Path(base) / "config.json"
    if not Path(base).is_dir():
        try:
            path = _download_config(base, [])
        except CheckpointError as error:
            problem = f"holds an unmerged adapter of {base!r}, which is not there; {cure}"
            raise CheckpointError(f"{source} {problem}") from error
    if not path.is_file():
        raise CheckpointError(f"{source} holds an unmerged adapter of {base!r}, which has no config.json; {cure}")
    return path


def _download_config(source: str, bundled: list[str]) -> Path:
    near = nearest(source, bundled)
    hint = f"did you mean {near[0]!r}? " if near else ""
    names = f"{hint}bundled models: {', '.join(bundled) or 'none'}"
    if not is_hub_id(source):
        raise CheckpointError(f"{source}: found no such folder and no bundled model of that name; {names}")
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            return Path(hf_hub_download(source, "config.json"))
    except Exception as error:
        if _is_adapter_on_hub(source):
            cure = "fetch it with huggingface_hub.snapshot_download, and load the folder that this gives"
            raise CheckpointError(f"{source} is an unmerged adapter without a config.json; {cure}") from error
        problem = f"no such folder, and config.json cannot be fetched from the hub ({type(error).__name__})"
        raise CheckpointError(f"{source}: {problem}; check the name or pass a local folder; {names}") from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence huggingface_hub's log of each attempt; the error reports the result."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_adapter_on_hub(source: str) -> bool:
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            hf_hub_download(source, ADAPTER_CONFIG)
    except Exception:  # any failure to get config.json
        return False
    return True
