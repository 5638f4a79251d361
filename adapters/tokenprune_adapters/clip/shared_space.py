"""CLIP's shared space of image and text embeddings, for vision towers whose folder contains the whole CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextModelWithProjection

from tokenprune.errors import CheckpointError
from tokenprune_adapters.clip.tower import fill_clip
from tokenprune_adapters.common.checkpoint import Checkpoint, read_json
from tokenprune_adapters.common.meta_model import meta_model

IMAGE, TEXT = "visual_projection.weight", "text_projection.weight"
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_NOT_TEXT = ("vision_model.", IMAGE, "logit_scale")
_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class ClipSpace:
    """Both projections and the text tower of a CLIP model, in float32, loaded on first use.

    Args:
        folder: folder of a whole CLIP model with its tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def find(cls, folder: Path) -> ClipSpace | None:
        """The space of the model in a folder; None if the folder contains only part of a CLIP model, such as the vision
        tower. Reads no weights."""
        if "text_config" not in read_json(folder / "config.json"):
            return None
        names = Checkpoint(folder).names()
        spoken = any(all((folder / file).is_file() for file in files) for files in _TOKENIZERS)
        return cls(folder) if IMAGE in names and TEXT in names and spoken else None

    @torch.no_grad()
    def embed_image(self, tower: nn.Module, states: Tensor) -> Tensor:
        """Patch rows of the tower in CLIP's space: float32 [B, P, C] to [B, P, D].

        Args:
            tower: the vision model, whose post layer norm is applied.
            states: [B, P, C].
        """
        inner: Any = getattr(tower, "vision_model", tower)  # nested in some releases of transformers
        normed: Tensor = inner.post_layernorm(states)
        return normed.float() @ self._visual_projection.to(states.device).T

    def embed_texts(self, texts: Sequence[str], cut: str, device: torch.device) -> Tensor:
        """Texts in CLIP's space: float32 [M, D], M at least the number of texts.

        Args:
            texts: one or more.
            cut: "truncate" or "segments", see `tokenprune.core.reads.ClipTextEmbeddings`.
            device: device of the text tower.

        Raises:
            CheckpointError: the text tower or the tokenizer cannot be loaded.
        """
        tower: Any = self.text_tower
        tower.to(device=device)
        return torch.cat([self.embed_ids(*self.cut_ids(text, cut)) for text in texts])

    def cut_ids(self, text: str, cut: str) -> tuple[Tensor, Tensor]:
        """Ids of a text in pieces of CLIP's context length, and their mask: int64 [M, n] each; see `embed_texts`."""
        length: int = self.text_tower.config.max_position_embeddings
        if cut == "truncate":
            pieces = [self._tokenizer(text, truncation=True, max_length=length)["input_ids"]]
        else:
            ids = self._tokenizer(text, verbose=False)["input_ids"]
            pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        rows = [torch.tensor(piece) for piece in pieces]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), mask

    @torch.no_grad()
    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings float32 [M, D] of ids and mask, int64 [M, n]."""
        tower: Any = self.text_tower
        embeddings: Tensor = tower(input_ids=ids.to(tower.device), attention_mask=mask.to(tower.device)).text_embeds
        return embeddings

    @cached_property
    def text_tower(self) -> CLIPTextModelWithProjection:
        """CLIP's text tower with projection. Raises CheckpointError if it cannot be loaded."""
        config = read_json(self.folder / "config.json")
        values = {**config["text_config"], **{name: config[name] for name in ("projection_dim",) if name in config}}
        sizes = {name: values[name] for name in _CONFIG_FIELDS if values.get(name) is not None}
        tower = meta_model(CLIPTextModelWithProjection, sizes, self.folder, "CLIP text model")
        fill_clip(tower, Checkpoint(self.folder), {name: name for name in tower.state_dict()}, torch.float32, _NOT_TEXT)
        return tower

    @cached_property
    def _visual_projection(self) -> Tensor:
        return Checkpoint(self.folder).tensor(IMAGE).float()

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            # Older releases read tokenizer.json only with this class; newer ones have one class under both names.
            return getattr(transformers, "CLIPTokenizerFast").from_pretrained(self.folder)  # noqa: B009 - typed in none
        except Exception as error:  # the exceptions of transformers differ between releases
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.folder}: CLIP's tokenizer cannot be loaded ({type(error).__name__}: {reason}); fetch "
                "tokenizer.json, or vocab.json and merges.txt"
            ) from error
