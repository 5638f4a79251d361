"""The supported vision-language models of transformers, by their `model_type`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune_adapters.hf.token_layouts import Arrangement, Frames, Merged, NormedPool, Shuffled, Tiled, Windowed


@dataclass(frozen=True)
class Family:
    """The properties of a family.

    Attributes:
        title: its name in messages.
        images: arrangement of its images.
        videos: arrangement of its videos; None = not supported.
        tower: path from the model to the vision tower.
        blocks: path from the tower to its layers.
        projects_patches: whether the projector takes single rows of the tower's states, one for each token.
    """

    title: str
    images: type[Arrangement] = Arrangement
    videos: type[Arrangement] | None = None
    tower: str = "vision_tower"
    blocks: str = "encoder.layers"
    projects_patches: bool = False


def _qwen(title: str, arrangement: type[Arrangement] = Merged) -> Family:
    return Family(title, arrangement, arrangement, "visual", "blocks")


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5", projects_patches=True),
    "llava_next": Family("LLaVA-NeXT", Tiled, projects_patches=True),
    "llava_onevision": Family("LLaVA-OneVision", Tiled, Frames),
    "qwen2_vl": _qwen("Qwen2-VL"),
    "qwen2_5_vl": _qwen("Qwen2.5-VL", Windowed),
    "qwen3_vl": _qwen("Qwen3-VL"),
    "qwen3_vl_moe": _qwen("Qwen3-VL-MoE"),
    "internvl": Family("InternVL", blocks="encoder.layer"),
    "smolvlm": Family("SmolVLM", Shuffled, tower="vision_model"),
    "idefics3": Family("Idefics3", Shuffled, tower="vision_model"),
    "paligemma": Family("PaliGemma"),
    "gemma3": Family("Gemma 3", NormedPool),
}
