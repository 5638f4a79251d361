"""The configuration that a checkpoint with code of its own comes with."""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen2Config


class InternVLChatConfig(PretrainedConfig):
    """The parts that the model reads."""

    model_type = "internvl_chat"
    sub_configs = {"llm_config": Qwen2Config}  # noqa: RUF012

    def __init__(self, vision_config=None, llm_config=None, downsample_ratio=0.5, **kwargs):
        self.vision_config = PretrainedConfig.from_dict({"num_hidden_layers": 2, **(vision_config or {})})
        self.llm_config = llm_config if isinstance(llm_config, Qwen2Config) else Qwen2Config(**(llm_config or {}))
        self.downsample_ratio = downsample_ratio
        super().__init__(**kwargs)
