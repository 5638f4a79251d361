"""A live vision-language model of transformers: its parts, and the reads of its tower."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.core.reads import (
    ClsAttention,
    ClsFeatures,
    ClsQuery,
    Crops,
    Projector,
    Read,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.wrappers import uncompiled
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture
from tokenprune.errors import InputError, UnsupportedError
from tokenprune_adapters.hf.conversations import Conversations
from tokenprune_adapters.hf.families import Family
from tokenprune_adapters.hf.vision_capture import METHODS, TransformersCapture

DECODERS = ("language_model", "text_model")
TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
VIDEO_TOWERS = ("video_tower", *TOWERS)
BLOCKS = ("encoder.layers", "encoder.layer", "blocks", "layers", "transformer.encoder.layers", "transformer.layers")
PROJECTORS = (
    "multi_modal_projector",
    "connector.modality_projection",
    "aligner",
    "visual.merger",
    "mm_projector",
    "projector",
    "resampler_model",
    "vision_adapter",
    "vision_tower.head_linear",
    "vision_projection",
    "vision_model.connector",
    "layerwise_projectors.0",
    "vision_tower.patch_merger",
)
FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")  # VipLLaVA's, in older releases of transformers
ATTENTION = ("self_attn", "attn", "attention")


class BoundTransformersModel(BoundModel):
    """A vision-language model of transformers.

    Args:
        model: the model, with or without its language-modelling head.
        family: the properties of its family.

    Raises:
        UnsupportedError: the model lacks a part that its family has.
    """

    def __init__(self, model: Any, family: Family) -> None:
        base = uncompiled(model.base_model)
        self.model, self.base, self.family, self.name = model, base, family, type(base).__name__
        self.decoder = base if hasattr(base, "layers") else self._part(base, DECODERS)
        self._check_layers()
        config = base.config
        cuts = family.cuts or getattr(config, "vision_feature_select_strategy", "full") == "default"
        self.cut, self.has_cls, self.tower_layers = int(cuts), False, 0
        if family.images.reads_tower:
            self.projector = self._part(base, PROJECTORS)
            towers = {"image": self._tower(TOWERS), "video": self._tower(VIDEO_TOWERS)}
            self.blocks = {
                modality: [uncompiled(block) for block in self._part(tower, BLOCKS)]
                for modality, tower in towers.items()
            }
            self.tower_layers = len(self.blocks["image"])
            names = {name for name, _ in towers["image"].named_parameters()}
            self.has_cls = cuts and any(name.endswith(("class_embedding", "cls_token")) for name in names)
        image, video = (
            getattr(config, f"{modality}_token_id", None) or getattr(config, f"{modality}_token_index", None)
            for modality in METHODS
        )
        own = None if video == image else video
        self.token_ids: dict[str, Any] = {"image": image, "video": image if family.one_token else own}

    def _check_layers(self) -> None:
        """Raise UnsupportedError for layers whose attention would be read, or renumbered, wrongly."""
        config = self.decoder.config
        scalings = {*getattr(self.decoder, "rope_types", ())}
        if getattr(config, "norm_after", False) or len(scalings) > 1:
            raise UnsupportedError(
                f"{self.name}: its decoder has norms after attention (norm_after), or rotary embeddings that are "
                "scaled in some layers only (rope_scaling_layers); choose a checkpoint without these"
            )

    def _part(self, inside: Any, paths: Sequence[str]) -> Any:
        """The submodule under the first of several paths that exists. Raises UnsupportedError if none does."""
        for path in paths:
            found = inside
            for step in path.split("."):
                found = uncompiled(getattr(found, step, None))
            if found is not None:
                return found
        raise UnsupportedError(
            f"{self.name} has none of {', '.join(paths)}, of which models of its family have one "
            f"({self.family.title}); it cannot be pruned"
        )

    def _tower(self, paths: Sequence[str]) -> Any:
        tower = self._part(self.base, paths)
        return getattr(tower, "vision_model", tower)  # nested in older releases of transformers

    def tower_attention(self, layer: int, modality: str = "image") -> nn.Module:
        """The attention module of a tower layer, negative ones from the end.

        Args:
            layer: number of the layer.
            modality: "image" or "video"; few models have a tower for each.

        Raises:
            InputError: the tower has no such layer.
            UnsupportedError: the layer has no attention module with a known name.
        """
        total = self.tower_layers
        if not -total <= layer < total:
            raise InputError(f"tower layer {layer} was requested, but the vision tower has {total} layers")
        block = self.blocks[modality][layer]
        for child in ATTENTION:
            attention = uncompiled(getattr(block, child, None))
            if isinstance(attention, nn.Module):
                return attention
        kind = type(block).__name__
        raise UnsupportedError(f"{self.name}: {kind} has none of {', '.join(ATTENTION)}, so it cannot be read")

    def offers(self) -> frozenset[type[Read]]:
        """All reads of the tower; those of [CLS] if it has one; the projector if it works token by token.

        None if the family's towers are not read.
        """
        if not self.family.images.reads_tower:
            return frozenset()
        extra = {
            ClsAttention: self.has_cls,
            ClsQuery: self.has_cls,
            ClsFeatures: self.has_cls and self.family.projects_patches and min(self.selected_blocks({})) >= 0,
            Crops: self.has_cls,
            Projector: self.family.images.projects,
        }
        always = (TowerFeatures, ReceivedAttention, TowerKeys, TowerValues, TowerStates)
        return frozenset((*always, *(kind for kind, has in extra.items() if has)))

    def selected_blocks(self, inputs: Mapping[str, Any]) -> list[int]:
        """The tower layers whose output the projector receives; −1 = the input of the first layer.

        Args:
            inputs: the arguments of `get_image_features`, by name.
        """
        config = self.base.config
        name = next(name for name in FEATURE_LAYERS if hasattr(config, name))
        layers = getattr(config, name) if inputs.get(name) is None else inputs[name]
        total = self.tower_layers + 1
        return [layer % total - 1 for layer in ([layers] if isinstance(layers, int) else layers)]

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
        """See `BoundModel.capture`. The methods that compute image features are intercepted on this object only."""
        capture = TransformersCapture(self, reads)
        with ExitStack() as undo:
            undo.enter_context(Conversations(self.model).separated(restored=False))
            undo.enter_context(shadowed(self.base, "forward", capture.forward))
            for modality, method in METHODS.items():
                undo.enter_context(shadowed(self.base, method, partial(capture.encode, modality)))
            capture.before.record()
            yield capture

    def project(self, features: Tensor) -> Tensor:
        """[B, k, C] -> [B, k, width], see `tokenprune.core.reads.Projector`."""
        images = self.family.images
        projected = images.embed(self.base, images.project(self.projector, features))
        scale = getattr(self.decoder, "embedding_multiplier", 1)  # of everything that enters the decoder
        return projected if scale == 1 else projected * scale
