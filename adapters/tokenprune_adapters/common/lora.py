"""Checkpoints with an unmerged LoRA adapter, read as if it were merged: W + scale · B · A (Hu et al., 2106.09685)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenprune.errors import CheckpointError
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, MERGE
from tokenprune_adapters.clip.tower_checks import COPY
from tokenprune_adapters.common.checkpoint import Checkpoint

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_FILES = ("non_lora_trainables.bin",)
"""What LLaVA's and its relatives' training writes beside the adapter: whole tensors that were trained as well."""

_SAFE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's own weights
_FOLLOWED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_type")
_OF_TRAINING = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
)
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<side>[AB])(?:\.default)?\.weight|embedding_(?P<row>[AB])(?:\.default)?)"
)


class MergedCheckpoint(Checkpoint):
    """A checkpoint with the adapter of a folder merged into each tensor as it is read.

    Sums and products are in float32, and the result has the base tensor's type. Whole tensors of the adapter (trained
    biases, `modules_to_save`, `non_lora_trainables.bin`) take the place of the base's.

    Args:
        base: folder of the weights that the adapter changes; may be the adapter's own.
        folder: holds adapter_config.json and adapter_model.safetensors or .bin.
        config: the adapter_config.json.

    Raises:
        CheckpointError: also where the adapter is of another kind than LoRA, uses what is not covered here, or changes
            what the base does not have.
    """

    def __init__(self, base: Path, folder: Path, config: dict[str, Any]) -> None:
        refuse_other_kinds(folder, config)
        if not any((folder / file).is_file() for file in ADAPTER_FILES):
            raise CheckpointError(f"{folder} has {ADAPTER_CONFIG}, but neither of {', '.join(ADAPTER_FILES)}; fetch it")
        super().__init__(base)
        self.adapter, self.config = folder, config
        self._whole: dict[str, tuple[Checkpoint, str]] = {}
        self._factors: dict[str, dict[str, tuple[Checkpoint, str]]] = {}
        self._tables: set[str] = set()  # embedding tables among the modules that have factors
        trained = [file for file in TRAINED_FILES if (folder / file).is_file()]
        for files in ([trained] if trained else []) + [list(ADAPTER_FILES)]:
            self._sort(Checkpoint(folder, files))
        self._check()

    def __contains__(self, name: str) -> bool:
        return name in self._whole or super().__contains__(name)

    def names(self) -> list[str]:
        """Names of all tensors of the base, and of whole ones that the adapter adds."""
        return list(dict.fromkeys([*super().names(), *self._whole]))

    def shape(self, name: str, dims: int | None = None) -> tuple[int, ...]:
        """As in `Checkpoint`."""
        checkpoint, stored = self._whole.get(name, (None, name))
        return super().shape(name, dims) if checkpoint is None else checkpoint.shape(stored, dims)

    def tensor(self, name: str) -> Tensor:
        """The tensor with the adapter merged into it."""
        checkpoint, stored = self._whole.get(name, (None, name))
        found = super().tensor(name) if checkpoint is None else checkpoint.tensor(stored)
        module = name.removesuffix(".weight")
        if module == name or module not in self._factors:
            return found
        left, right = (self._factor(module, side) for side in "BA")
        change = self.scale(module, right.shape[0]) * (left @ right)
        if module in self._tables:  # whose factors are stored the other way round
            change = change.T
        if change.shape != found.shape or not found.is_floating_point():
            raise self._error(f"changes {module} by {list(change.shape)}, which is {list(found.shape)} in the base")
        return (found.float() + change).to(found.dtype)

    def scale(self, module: str, rank: int) -> float:
        """What B · A is multiplied by: alpha / rank, or with `use_rslora` alpha / √rank."""
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _factor(self, module: str, side: str) -> Tensor:
        checkpoint, stored = self._factors[module][side]
        return checkpoint.tensor(stored).float()

    def _sort(self, tensors: Checkpoint) -> None:
        for stored in tensors.names():
            name = plain_name(stored)
            factor = _FACTOR.fullmatch(name)
            if factor:
                side = factor["side"] or factor["row"]
                self._factors.setdefault(factor["module"], {})[side] = (tensors, stored)
                if factor["row"]:
                    self._tables.add(factor["module"])
            elif "lora_" in name:
                raise self._error(f"holds {stored}, which is not covered here")
            else:
                self._whole[name] = (tensors, stored)

    def _check(self) -> None:
        if not self._factors:
            raise self._error("holds no LoRA factors")
        tower = [name for name in (*self._factors, *self._whole) if name.startswith(COPY)]
        if tower:
            raise self._error(f"changes the vision tower ({tower[0]}), which is read from a folder of its own")
        for module, sides in self._factors.items():
            if set(sides) != {"A", "B"}:
                raise self._error(f"has only the factor {next(iter(sides))} of {module}")
            if f"{module}.weight" not in self:
                raise self._error(f"changes {module}, which the base {self.folder} does not have")
            shapes = {side: checkpoint.shape(stored) for side, (checkpoint, stored) in sides.items()}
            rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
            if any(len(shape) != 2 for shape in shapes.values()):
                raise self._error(f"changes {module}, which is no linear layer")
            if shapes["A"][0] != rank or shapes["B"][1] != rank:
                raise self._error(f"says rank {rank} for {module}, whose factors are {list(shapes.values())}")

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"the adapter in {self.adapter} {problem}; {MERGE}")


def refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError for an adapter that is no LoRA, or one with settings that merging would have to know."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds an adapter of kind {config.get('peft_type')!r}, expected LORA; {MERGE}")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or config[name] <= 0:
            raise CheckpointError(
                f"{folder}/{ADAPTER_CONFIG}: {name} is {config.get(name)!r}, expected a number above 0"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, value in dict(config.get(name) or {}).items():
            if not isinstance(value, (int, float)) or value <= 0 or not _is_pattern(pattern):
                raise CheckpointError(
                    f"{folder}/{ADAPTER_CONFIG}: {name} has {pattern!r}: {value!r}, expected a regular expression "
                    "and a number above 0"
                )
    unknown = [name for name, value in config.items() if value and name not in (*_FOLLOWED, *_OF_TRAINING)]
    unknown = [name for name in unknown if (name, config[name]) != ("revision", "main")]
    if config.get("init_lora_weights", True) not in _SAFE_STARTS:
        unknown.append("init_lora_weights")
    if unknown:
        told = ", ".join(f"{name}={config[name]!r}" for name in unknown)[:200]
        raise CheckpointError(f"{folder}/{ADAPTER_CONFIG} says {told}, which is not covered here; {MERGE}")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def plain_name(stored: str) -> str:
    """A tensor's name without what peft wraps around it."""
    name = stored.removeprefix("base_model.model.").removeprefix("base_model.")
    return re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)", "", name)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends in, as peft looks it up."""
    return next((v for pattern, v in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
