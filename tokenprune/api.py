"""`strategy` and `load`: from a name to an object."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import CheckpointError, OptionError, nearest
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, MERGE, base_of
from tokenprune.plugins import registry
from tokenprune.plugins.entries import not_loaded
from tokenprune.utils.files import expanded

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy
    from tokenprune.plugins.entries import Entry


def strategy(name: str, budget: float | None = None, **options: Any) -> Strategy:
    """A strategy by name.

    Args:
        name: a name of `tokenprune.strategies()`, or several joined by "+", which run one after the other (see
            `tokenprune.Sequence`; its options are `budgets` and `parts`). A registered name that holds a "+" wins.
        budget: equivalent image tokens as a fraction of all image tokens, in (0, 1]; solved for when the strategy runs.
        options: fields of the strategy's `Options`.

    Raises:
        UnknownNameError: no such strategy.
        OptionError: an unknown option, a value out of range, or an option that would have no effect.
        BudgetError: a budget out of range, or for a strategy that has nothing to move.
        PluginError: the strategy's module cannot be imported, or its class cannot be made.
    """
    parts = parts_of(name)
    if len(parts) > 1:
        from tokenprune.core.composition import Sequence

        joined = Sequence(*(part.name for part in parts), budget=budget, **options)
        for part in joined.parts:
            _check_effects(part)
        return joined
    (entry,) = parts
    kind = entry.load()
    with entry.running():
        made: Strategy = kind(budget=budget, **options)
        _check_effects(made)
    return made


def _check_effects(made: Strategy) -> None:
    for option, why in made.without_effect().items():
        if option in made.options.model_fields_set:
            raise OptionError(f"strategy {made.name!r}: option {option!r} has no effect {why}; leave it out")


def parts_of(name: str) -> list[Entry]:
    """The strategies that a name stands for: one, or those that a "+" joins; none is imported.

    Raises:
        UnknownNameError: no such strategy.
        PluginError: two packages register it.
    """
    known = registry.strategies()
    joined = name not in known and "+" in name
    names = (names_in(name, known) or name.split("+")) if joined else [name]
    return [registry.get("strategies", part) for part in names]


def names_in(text: str, known: Collection[str]) -> list[str] | None:
    """The registered names that "a+b" joins, where names may hold a "+" themselves; None where that cannot be."""
    if text in known:
        return [text]
    for name in sorted(known, key=len, reverse=True):
        if text.startswith(name + "+"):
            rest = names_in(text[len(name) + 1 :], known)
            if rest is not None:
                return [name, *rest]
    return None


def load(name_or_path: str | Path, **options: Any) -> Any:
    """A model by name, folder or hub id.

    Args:
        name_or_path: a bundled model (`tokenprune list` shows them), a checkpoint folder, or a hub id.
        options: passed to the adapter: `dtype`, `device`, `device_map`, `vision_tower`, …

    Raises:
        CheckpointError: nothing is there, or no adapter knows this kind of checkpoint.
        PluginError: an adapter cannot be imported, or raises what is no TokenPruneError; a bundled model's folder is
            not there.
    """
    source, config = find_checkpoint(name_or_path)
    adapters = registry.adapters()
    for entry in adapters.values():
        if entry.call(source, config, method="matches"):
            kind = entry.load()
            if not getattr(kind, "merges_lora", False) and base_of(expanded(source)) is not None:
                raise CheckpointError(
                    f"{source} holds an unmerged adapter ({ADAPTER_CONFIG}), which {entry.name!r} does not merge; "
                    f"{MERGE}"
                )
            from tokenprune.utils.torch_state import loading  # imports torch, as adapters that load do

            with entry.running("load"), loading():
                model = kind.load(source, **options)
            if model is None:
                raise entry.refusal("gave None in load(), expected the model")
            if str(name_or_path) in registry.models() and hasattr(model, "name"):
                model.name = str(name_or_path)  # reports call a bundled model as users do, not by its folder
            return model
    found = f"architectures {config.get('architectures')}, model_type {config.get('model_type')!r}"
    known = f"{', '.join(adapters) or 'none'}{not_loaded(registry.broken_plugins())}"
    raise CheckpointError(f"{source}: no adapter knows this checkpoint; found {found}; installed adapters: {known}")


def find_checkpoint(name_or_path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """The folder or hub id that a model's name stands for, and its config.json; nothing is loaded.

    Raises:
        CheckpointError: nothing is there.
        PluginError: a bundled model's folder is not there.
    """
    source = str(name_or_path)
    bundled = registry.models()
    if source in bundled:
        source = str(_folder(bundled[source]))
    return source, _read_config(source, list(bundled))


def is_hub_id(source: str) -> bool:
    """Whether a text may be the id of a repository on the hub."""
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
    """The config.json of the model that the adapter in a folder changes."""
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
        return Path(hf_hub_download(source, "config.json"))
    except Exception as error:
        if _is_adapter_on_hub(source):
            cure = "fetch it with huggingface_hub.snapshot_download, and load the folder that this gives"
            raise CheckpointError(f"{source} is an unmerged adapter without a config.json; {cure}") from error
        problem = f"no such folder, and config.json cannot be fetched from the hub ({type(error).__name__})"
        raise CheckpointError(f"{source}: {problem}; check the name or pass a local folder; {names}") from error


def _is_adapter_on_hub(source: str) -> bool:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(source, ADAPTER_CONFIG)
    except Exception:  # whatever kept config.json away
        return False
    return True
