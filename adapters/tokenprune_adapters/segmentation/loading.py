"""Loading of segmentation checkpoints: the steps that all families share, from checking options to placing parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from transformers import CLIPVisionModel

from tokenprune.errors import CheckpointError
from tokenprune.loading.adapter import Adapter
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, adapter_config, base_of
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.clip.tower import find_tower, load_tower
from tokenprune_adapters.clip.tower_checks import ADVICE, COPY, check_tower
from tokenprune_adapters.common.checkpoint import Checkpoint, Part, load_parts, read_json, resolve_folder
from tokenprune_adapters.common.load_options import (
    LoadOptions,
    check_one_placement,
    refuse_unknown,
    shown_name,
    torch_device,
    torch_dtype,
)
from tokenprune_adapters.common.lora import MergedCheckpoint
from tokenprune_adapters.common.storage_formats import refuse_quantised, refuse_wrapped
from tokenprune_adapters.common.tokenizer import LlamaSlowTokenizer, load_tokenizer
from tokenprune_adapters.llava.decoder import build_llama, finish_llama, home_of, is_rotary_table, place, quantised
from tokenprune_adapters.llava.projector import ProjectorPlan
from tokenprune_adapters.llava.prompt import IM_END, IM_START
from tokenprune_adapters.segmentation.segmenter import Segmenter

MASK_PROJECTION = "model.text_hidden_fcs.0."
EMBEDDING = "model.embed_tokens.weight"

OptionsT = TypeVar("OptionsT", bound=LoadOptions)


class SegmenterAdapter(Adapter):
    """Base of the adapters of segmentation families; a family sets its name and builds its model."""

    merges_lora = True
    family: ClassVar[str]
    """Its name in messages; config.json's `architectures` begin with it (ignoring case)."""

    prefix: ClassVar[str]
    """Prefix of some tensors' names in every checkpoint of the family."""
    embedding: ClassVar[str] = EMBEDDING
    """Name of the decoder's embedding table."""
    options: ClassVar[type[LoadOptions]] = LoadOptions
    """The load options; a family may use a subclass, which checks its additional fields."""

    @classmethod
    @abstractmethod
    def build(cls, opened: Opened[Any]) -> Segmenter:
        """Build and load the model; its parts may be on any device and in training mode.

        Raises:
            CheckpointError: as in `load`.
        """

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether config.json names an architecture of this family."""
        return any(str(name).lower().startswith(cls.family.lower()) for name in config.get("architectures") or ())

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        """Load a checkpoint in its original format into modules of transformers.

        Args:
            source: folder or hub id. Weights may be sharded or not, .bin or safetensors, with a LoRA adapter that is
                merged or not (see `tokenprune_adapters.common.lora`).
            options: see `LoadOptions`, or the family's subclass.

        Raises:
            CheckpointError: a file or tensor is missing, damaged, unexpected or mis-shaped, the tokenizer or the tower
                does not match, or the checkpoint belongs to another family.
            OptionError: an unknown option, dtype or device, or both device= and device_map=.
        """
        refuse_unknown(options, [field.name for field in fields(cls.options)], cls.family)
        opened = open_checkpoint(source, cls.options(**options), cls.embedding)
        refuse_other_families(opened, cls.family, cls.prefix)
        return opened.placed(cls.build(opened))


@dataclass(frozen=True)
class Opened(Generic[OptionsT]):
    """A checkpoint that is being loaded.

    Args:
        source: folder or hub id from the caller.
        options: the load options.
        folder: its folder; with an unmerged adapter, the folder of the base.
        config: its config.json.
        checkpoint: its tensors.
        device: device of all parts, unless `options.device_map` is set.
        dtype: dtype of all weights.
        adapter: folder of an adapter that is merged into the weights; its other files take precedence over the base's.
    """

    source: str | Path
    options: OptionsT
    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    adapter: Path | None = None

    def home(self, name: str) -> Path:
        """The folder that contains a file or folder of that name: the adapter's, else the base's."""
        own = self.adapter is not None and (self.adapter / name).exists()
        return self.adapter if own and self.adapter is not None else self.folder

    @property
    def mark_image(self) -> bool:
        """Whether prompts have <im_start> and <im_end> around the image."""
        return bool(self.config.get("mm_use_im_start_end", False))

    def tokenizer(self, seg_tokens: Sequence[str]) -> LlamaSlowTokenizer:
        """The tokenizer. Raises CheckpointError if it lacks a mask token or does not match the embedding table."""
        return load_tokenizer(
            self.home("tokenizer.model"),
            required=[*seg_tokens, *([IM_START, IM_END] if self.mark_image else [])],
            rows=self.checkpoint.shape(EMBEDDING, dims=2)[0],
        )

    def projector(self) -> ProjectorPlan:
        """The projector's structure. Raises CheckpointError if it is unsupported or config.json does not match."""
        return ProjectorPlan(self.checkpoint, self.config)

    def tower(self, reads: int, resized: int | None = None) -> tuple[CLIPVisionModel, Path]:
        """The CLIP tower and its folder; see `find_tower`.

        Args:
            reads: width of the projector's input.
            resized: see `check_tower`.

        Raises:
            CheckpointError: the tower is missing or damaged, has another width, or is not the checkpoint's.
        """
        folder = find_tower(self.home("vision_tower"), self.config, self.options.vision_tower)
        tower = load_tower(folder, self.dtype, self.options.attn_implementation)
        if reads != tower.config.hidden_size:
            raise CheckpointError(
                f"vision tower {folder} has features of width {tower.config.hidden_size}, but the projector of "
                f"{self.folder} takes {reads}; {ADVICE}"
            )
        check_tower(self.checkpoint, self.config, tower, folder, resized)
        return tower, folder

    def about(self, tower_folder: Path) -> dict[str, Any]:
        """The arguments of a model's constructor, other than modules, that all families share."""
        return {
            "select_layer": int(self.config.get("mm_vision_select_layer", -2)),
            "mark_image": self.mark_image,
            "name": shown_name(self.source),
            "clip_space": ClipSpace.find(tower_folder),
        }

    def fill(
        self,
        parts: Callable[[int], Sequence[Part[Any]]],
        ignore: Callable[[str], bool] = lambda name: False,
        decoder: Part[Any] | None = None,
    ) -> list[Any]:
        """Load all weights except those of a tower in a folder of its own.

        Args:
            parts: from the decoder's width to the family's own modules.
            ignore: whether a tensor of that name may be unused, besides rotary tables and a copy of the tower.
            decoder: on the meta device; None = a LLaMA that config.json describes.

        Returns:
            The decoder, then the modules of `parts`.

        Raises:
            CheckpointError: tensors are missing, unexpected or mis-shaped, or config.json describes no decoder.
        """
        language = decoder or build_llama(self.checkpoint, self.config, self.options.attn_implementation)
        own = parts(language.module.config.hidden_size)

        def may_be_unused(name: str) -> bool:
            # A tower in the checkpoint is a copy; like the authors' code, load the one that config.json names.
            return is_rotary_table(name) or name.startswith(COPY) or ignore(name)

        load_parts(self.checkpoint, [language, *own], self.dtype, ignore=may_be_unused)
        finish_llama(language.module)
        loaded, wanted = language.module, self.options.quantization_config
        if wanted is not None:
            places = self.options.device_map or {"": str(self.device)}
            loaded = quantised(loaded, wanted, places, str(self.source))
        return [loaded, *(part.module for part in own)]

    def placed(self, model: Segmenter) -> Segmenter:
        """The model in eval mode, on its device or distributed over several."""
        model.eval()
        if self.options.quantization_config is not None:
            home = home_of(model.decoder)
        elif self.options.device_map is None:
            return model.to(device=self.device)
        else:
            home = place(model.decoder, self.options.device_map)
        for name, module in model.named_children():
            if name != "decoder":
                module.to(device=home)
        return model


def open_checkpoint(source: str | Path, options: OptionsT, embedding: str = EMBEDDING) -> Opened[OptionsT]:
    """Check the options and open a checkpoint's folder, without loading weights.

    Args:
        source: folder or hub id.
        options: the caller's load options.
        embedding: name of the embedding table, whose stored dtype is the default.

    Raises:
        CheckpointError: a file is missing or damaged.
        OptionError: an unknown dtype or device, or both device= and device_map=.
    """
    check_one_placement(options.device, options.device_map)
    target, kind = torch_device(options.device), torch_dtype(options.dtype)
    folder, adapter = resolve_folder(source), None
    lora = adapter_config(folder)
    if lora is None:
        checkpoint = Checkpoint(folder)
    else:
        adapter, folder = folder, _base(folder)
        checkpoint = MergedCheckpoint(folder, adapter, lora)
    own = adapter is not None and (adapter / "config.json").is_file()
    config = read_json((adapter if own and adapter is not None else folder) / "config.json")
    refuse_quantised(folder, config, checkpoint)
    refuse_wrapped(checkpoint)
    if kind is None:
        on_cpu = target.type == "cpu" and options.device_map is None
        kind = torch.float32 if on_cpu or embedding not in checkpoint else checkpoint.tensor(embedding).dtype
    return Opened(source, options, folder, config, checkpoint, target, kind, adapter)


def _base(adapter: Path) -> Path:
    """The folder of an adapter's base model."""
    base = base_of(adapter)
    assert base is not None
    advice = f"it is the base that {adapter / ADAPTER_CONFIG} names; put it there, or correct base_model_name_or_path"
    return resolve_folder(base, "base model", advice)


def refuse_other_families(opened: Opened[Any], family: str, prefix: str) -> None:
    """Raise CheckpointError if no tensor's name starts with `prefix`, as in every checkpoint of the family."""
    if any(name.startswith(prefix) for name in opened.checkpoint.names()):
        return
    config = opened.config
    raise CheckpointError(
        f"{opened.folder} is no {family} checkpoint: no tensors are under {prefix.removesuffix('.')}, and config.json "
        f"says architectures {config.get('architectures')}, model_type {config.get('model_type')!r}; "
        "load it with its own adapter"
    )


def mlp(prefix: str, inputs: int, hidden: int, outputs: int, activation: nn.Module) -> Part[nn.Sequential]:
    """Linear, activation, linear; their tensors are under `prefix`0. and `prefix`2."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))
    return under(prefix, module)


def under(prefix: str, module: Any) -> Part[Any]:
    """A module whose tensors have the same names in the checkpoint, after a prefix."""
    return Part(module, {name: prefix + name for name in module.state_dict()})
