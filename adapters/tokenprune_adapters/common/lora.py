"""Checkpoints with an unmerged LoRA adapter, merged while reading: W + scale · B · A (Hu et al., arXiv 2106.09685)."""

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
"""Files of other trained tensors that LLaVA's training code writes with the adapter."""

_SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights
_SUPPORTED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_type")
_TRAINING_ONLY = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
)
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<side>[AB])(?:\.default)?\.weight|embedding_(?P<row>[AB])(?:\.default)?)"
)


class MergedCheckpoint(Checkpoint):
    """A checkpoint with an adapter that is merged into each tensor when it is read.

    Merging is computed in float32, and the result has the base tensor's dtype. Whole tensors of the adapter (trained
    biases, `modules_to_save`, `non_lora_trainables.bin`) replace those of the base.

    Args:
        base: folder of the base weights; may be the adapter's folder.
        folder: contains adapter_config.json and adapter_model.safetensors or .bin.
        config: the adapter_config.json.

    Raises:
        CheckpointError: also if the adapter is not a LoRA adapter, uses unsupported settings, or changes tensors that
            the base does not have.
    """

    def __init__(self, base: Path, folder: Path, config: dict[str, Any]) -> None:
        refuse_other_kinds(folder, config)
        if not any((folder / file).is_file() for file in ADAPTER_FILES):
            raise CheckpointError(f"{folder} has {ADAPTER_CONFIG}, but neither of {', '.join(ADAPTER_FILES)}; fetch it")
        super().__init__(base)
        self.adapter, self.config = folder, config
        self._whole: dict[str, tuple[Checkpoint, str]] = {}
        self._factors: dict[str, dict[str, tuple[Checkpoint, str]]] = {}
        self._tables: set[str] = set()  # embedding tables among the modules with factors
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
        if module in self._tables:  # their factors are stored transposed
            change = change.T
        if change.shape != found.shape or not found.is_floating_point():
            raise self._error(f"changes {module} by {list(change.shape)}, which is {list(found.shape)} in the base")
        return (found.float() + change).to(found.dtype)

    def scale(self, module: str, rank: int) -> float:
        """The factor on B · A: alpha / rank, or with `use_rslora` alpha / √rank."""
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
                raise self._error(f"contains {stored}, which is not supported")
            else:
                self._whole[name] = (tensors, stored)

    def _check(self) -> None:
        if not self._factors:
            raise self._error("contains no LoRA factors")
        tower = [name for name in (*self._factors, *self._whole) if name.startswith(COPY)]
        if tower:
            raise self._error(f"changes the vision tower ({tower[0]}), which is loaded from a separate folder")
        for module, sides in self._factors.items():
            if set(sides) != {"A", "B"}:
                raise self._error(f"has only the factor {next(iter(sides))} of {module}")
            if f"{module}.weight" not in self:
                raise self._error(f"changes {module}, which the base {self.folder} does not have")
            shapes = {side: checkpoint.shape(stored) for side, (checkpoint, stored) in sides.items()}
            rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
            if any(len(shape) != 2 for shape in shapes.values()):
                raise self._error(f"changes {module}, which is not a linear layer")
            if shapes["A"][0] != rank or shapes["B"][1] != rank:
                raise self._error(f"says rank {rank} for {module}, whose factors are {list(shapes.values())}")

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"the adapter in {self.adapter} {problem}; {MERGE}")


def refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError for an adapter that is not LoRA, or has settings that merging does not support."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} contains an adapter of type {config.get('peft_type')!r}, expected LORA; {MERGE}"
        )
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
    unknown = [name for name, value in config.items() if value and name not in (*_SUPPORTED, *_TRAINING_ONLY)]
    unknown = [name for name in unknown if (name, config[name]) != ("revision", "main")]
    if config.get("init_lora_weights", True) not in _SUPPORTED_INITS:
        unknown.append("init_lora_weights")
    if unknown:
        settings = ", ".join(f"{name}={config[name]!r}" for name in unknown)[:200]
        raise CheckpointError(f"{folder}/{ADAPTER_CONFIG} has {settings}, which is not supported; {MERGE}")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def plain_name(stored: str) -> str:
    """A tensor's name without the prefixes of peft."""
    name = stored.removeprefix("base_model.model.").removeprefix("base_model.")
    return re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)", "", name)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    return next((v for pattern, v in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
