"""The model that a checkpoint with code of its own comes with, written for these tests.

It has the interface of InternVL's class (`vision_model`, `mlp1`, `language_model`, `img_context_token_id`,
`extract_feature`, `forward`, `generate`), not its code, and a smaller tower.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2ForCausalLM

from .configuration_internvl_chat import InternVLChatConfig

WIDTH, PATCH = 16, 4


class Tower(nn.Module):
    """[tiles, 3, H, W] -> [tiles, 1 + patches, 16]."""

    def __init__(self, layers):
        super().__init__()
        self.cut = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True) for _ in range(layers)
        )

    def forward(self, pixels):
        states = self.cut(pixels).flatten(2).transpose(1, 2)
        states = torch.cat((self.cls.expand(len(states), -1, -1), states), 1)
        for layer in self.layers:
            states = layer(states)
        return states


class InternVLChatModel(PreTrainedModel):
    """Tower, projector and a Qwen2."""

    config_class = InternVLChatConfig

    def __init__(self, config):
        super().__init__(config)
        self.img_context_token_id = None
        self.vision_model = Tower(config.vision_config.num_hidden_layers)
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        merged = WIDTH * int(1 / config.downsample_ratio) ** 2
        width = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))
        self.post_init()

    def extract_feature(self, pixel_values):
        """[tiles, tokens, width]: four patches, two by two, make a token."""
        states = self.vision_model(pixel_values)[:, 1:]
        tiles, patches, width = states.shape
        side, step = int(patches**0.5), int(1 / self.config.downsample_ratio)
        squares = states.view(tiles, side // step, step, side // step, step, width).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(squares.reshape(tiles, (side // step) ** 2, -1))

    def _embeddings(self, pixel_values, input_ids):
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        if pixel_values is not None:
            embeds[input_ids == self.img_context_token_id] = self.extract_feature(pixel_values).flatten(0, 1)
        return embeds

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, image_flags=None, **kwargs):
        """Without `image_flags`, every tile counts, as InternVL's code wants it told."""
        if pixel_values is not None and image_flags is not None:
            pixel_values = pixel_values[image_flags.squeeze(-1) == 1]
        embeds = self._embeddings(pixel_values, input_ids)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        """The new tokens alone, since the language model generates from embeddings."""
        embeds = self._embeddings(pixel_values, input_ids)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
