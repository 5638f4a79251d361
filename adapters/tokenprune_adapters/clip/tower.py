"""CLIP vision towers: finding, loading and preprocessing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint, Part, load_parts, read_json, resolve_folder
from tokenprune_adapters.common.meta_model import meta_model

PREPROCESSOR = "preprocessor_config.json"
ADVICE = "pass vision_tower= the folder of the CLIP model"
_NOT_VISION = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")


def find_tower(folder: Path, config: dict[str, Any], vision_tower: str | Path | None) -> Path:
    """The folder of the vision tower of a LLaVA-like checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.json, which names the tower.
        vision_tower: folder or hub id from the caller; by default the folder `vision_tower` in the checkpoint, else
            the name in `config`, as a path or a hub id.

    Raises:
        CheckpointError: no tower was found.
    """
    if vision_tower is not None:
        return resolve_folder(vision_tower, "vision tower", ADVICE)
    if (folder / "vision_tower").is_dir():
        return folder / "vision_tower"
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not name:
        raise CheckpointError(f"{folder}/config.json names no vision tower; {ADVICE}")
    return resolve_folder(str(name), "vision tower", f"{folder} does not contain it, so {ADVICE}")


def load_tower(folder: Path, dtype: torch.dtype, attn_implementation: str | None = None) -> CLIPVisionModel:
    """A CLIP vision model, on the CPU.

    Args:
        folder: a CLIP vision model, or a whole CLIP model, of which only the vision part is read.
        dtype: dtype of the weights.
        attn_implementation: as in transformers; None = its default.

    Raises:
        CheckpointError: not a CLIP model, or tensors are missing, unexpected or mis-shaped.
    """
    values = read_json(folder / "config.json")
    values = values.get("vision_config") or values
    kind = values.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise CheckpointError(f"vision tower {folder} is of model type {kind!r}, expected a CLIP model; {ADVICE}")
    sizes = {name: values[name] for name in _CONFIG_FIELDS if values.get(name) is not None}
    tower = meta_model(CLIPVisionModel, sizes, folder, "CLIP vision model", attn_implementation, ADVICE)
    checkpoint = Checkpoint(folder)
    # Some releases of transformers nest the tower one level deeper, and so do their files.
    flat = {name.removeprefix("vision_model."): name for name in checkpoint.names()}
    names = {
        target: flat.get(target.removeprefix("vision_model."), target.removeprefix("vision_model."))
        for target in tower.state_dict()
    }
    fill_clip(tower, checkpoint, names, dtype, _NOT_VISION)
    return tower


def fill_clip(
    tower: Any, checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype, others: tuple[str, ...]
) -> None:
    """Load the weights of a CLIP tower on the meta device, set its position ids, and put it in eval mode.

    Args:
        tower: the vision tower or the text tower.
        checkpoint: its checkpoint, or that of a whole CLIP model.
        names: from its tensors' names to those in the checkpoint.
        dtype: dtype of the weights.
        others: prefixes of the tensors that belong to the rest of the CLIP model.

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped.
    """
    parts = [Part(tower, dict(names))]
    load_parts(checkpoint, parts, dtype, ignore=lambda name: name.startswith(others) or name.endswith("position_ids"))
    embeddings = next(module for module in tower.modules() if hasattr(module, "position_embedding"))
    positions = torch.arange(embeddings.position_embedding.num_embeddings).expand(1, -1)
    embeddings.register_buffer("position_ids", positions, persistent=False)
    tower.eval()


_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


class ClipPixels:
    """The image processor of a tower: PIL-based, so that pixels equal those that the models were trained on.

    Args:
        folder: contains `preprocessor_config.json`; without it CLIP's constants at the tower's image size are used.
        tower: the vision model.

    Raises:
        CheckpointError: the file describes no image processor.
    """

    def __init__(self, folder: Path, tower: CLIPVisionModel) -> None:
        config: Any = tower.config
        self.folder, self.square = folder, int(config.image_size)
        self._processor = _processor(folder) or processor_class()(
            size={"shortest_edge": self.square}, crop_size={"height": self.square, "width": self.square}
        )

    def check(self, checkpoint: Path, openai: bool) -> None:
        """Check that the processor matches the tower and the checkpoint.

        Args:
            checkpoint: a folder that may contain another `preprocessor_config.json`.
            openai: whether the checkpoint was trained with one of OpenAI's towers, whose mean and std are known.

        Raises:
            CheckpointError: it has another image size, omits a step, or normalises differently.
        """
        found = self._processor
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not getattr(found, step):
                self._refuse(f"sets {step} to false, but the tower was trained with that step")
        if not math.isclose(found.rescale_factor, 1 / 255, rel_tol=1e-3):
            self._refuse(f"sets rescale_factor to {found.rescale_factor}, expected 1/255")
        own = _processor(checkpoint) if checkpoint != self.folder else None
        if _side(found) != f"{self.square}×{self.square}":
            self._refuse(f"makes pictures of {_side(found)} pixels, but the tower takes {self.square}×{self.square}")
        if own and _side(own) != _side(found):
            self._refuse(f"makes pictures of {_side(found)} pixels, but {checkpoint}/{PREPROCESSOR} of {_side(own)}")
        colours = processor_class()() if openai else None  # whose own are OpenAI's
        for name in ("image_mean", "image_std"):
            values = getattr(found, name)
            shown = list(values) if isinstance(values, (list, tuple)) else values
            if not isinstance(values, (list, tuple)) or len(values) != 3 or (name == "image_std" and min(values) <= 0):
                self._refuse(f"says {name} {shown}, expected three numbers" + " above 0" * (name == "image_std"))
            for wanted, source in (
                (colours and getattr(colours, name), "the tower that config.json names"),
                (own and getattr(own, name), f"{checkpoint}/{PREPROCESSOR}"),
            ):
                if wanted and not np.allclose(values, wanted, atol=1e-3):
                    self._refuse(f"says {name} {shown}, but {source} has {list(wanted)}")

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(
            f"{self.folder}/{PREPROCESSOR} {problem}; use the {PREPROCESSOR} that belongs to the tower"
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels float32 [1, 3, H, W] of an RGB image."""
        # Explicit, since older releases mistake an image with one or three rows for one with channels first.
        given = {"images": image, "input_data_format": "channels_last", "return_tensors": "pt"}
        pixels: Tensor = self._processor(**given)["pixel_values"]
        return pixels

    def picture(self, pixels: Tensor) -> Tensor:
        """The resized and cropped image of pixels float32 [B, 3, H, W]: uint8 [B, H, W, 3]."""
        mean = torch.tensor(self._processor.image_mean).view(3, 1, 1)
        std = torch.tensor(self._processor.image_std).view(3, 1, 1)
        values: Tensor = (pixels.float().cpu() * std + mean) / self._processor.rescale_factor
        return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(top, left, bottom, right): the part of an image that is left after resizing and cropping, in its own pixels.

        Args:
            height, width: of the image.
        """
        if not self._processor.do_center_crop:
            return 0.0, 0.0, float(height), float(width)
        size, crop = self._processor.size, self._processor.crop_size
        if size.get("shortest_edge"):
            short = min(height, width)
            resized = (int(size["shortest_edge"] * height / short), int(size["shortest_edge"] * width / short))
        else:
            resized = (size["height"], size["width"])
        top, left = (resized[0] - crop["height"]) // 2, (resized[1] - crop["width"]) // 2
        rows, columns = height / resized[0], width / resized[1]
        return top * rows, left * columns, (top + crop["height"]) * rows, (left + crop["width"]) * columns


def _processor(folder: Path) -> Any:
    """The image processor that a folder describes; None if it describes none."""
    file = folder / PREPROCESSOR
    options = read_json(file) if file.is_file() else {}
    for name in ("image_processor_type", "feature_extractor_type"):
        kind = str(options.pop(name, "CLIP"))
        if not kind.startswith("CLIP"):
            raise CheckpointError(f"{file} is for {kind}, expected CLIP's; use the file that belongs to the tower")
    options.pop("processor_class", None)
    if not options:
        return None
    try:
        return processor_class()(**options)
    except Exception as error:  # the exceptions of processors differ between releases
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} describes no CLIP image processor: {reason}; fetch the file again") from error


def _side(processor: Any) -> str:
    """Width and height of the processed image, as text; "various" if they depend on the image."""
    size, crop = processor.size, processor.crop_size
    height, width = (int(size.get(name) or size.get("shortest_edge") or 0) for name in ("height", "width"))
    if processor.do_center_crop:
        if height < crop["height"] or width < crop["width"]:
            return f"{crop['width']}×{crop['height']} (cropped from less)"
        height, width = crop["height"], crop["width"]
    elif size.get("shortest_edge"):
        return "various"
    return f"{width}×{height}"


def processor_class() -> Any:
    """The PIL-based image processor of CLIP, whatever its name in the installed release of transformers."""
    import transformers

    # In newer releases CLIPImageProcessor is the processor based on torchvision.
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
