"""The decoder with LoRA on the first layers, reading many queries of one picture at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from tokenprune_adapters.photos.parts import Projector, ReadOut
from tokenprune_adapters.photos.text import AFTER, BEFORE, SEG_IN_VOCABULARY

RANK = 16
HINTED = 2  # the first layer, from 0, whose attention a hint changes


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained one of low rank, kept in float32, beside it (Hu et al., 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        low = functional.linear(x, self.down.to(x.dtype))
        return self.base(x) + 2 * functional.linear(low, self.up.to(x.dtype))


def add_lora(decoder: LlamaForCausalLM) -> None:
    """Put LoRA on all seven linear layers of every decoder layer."""
    for layer in decoder.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, LoraLinear(child))


class Tap(nn.Module):
    """What is read after some layer: a place from the mask query's state, and, for the training only, a pointer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = ReadOut(width)
        self.asks = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))
        self.shows = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def point_at(self, states: Tensor, images: Tensor) -> Tensor:
        """Logits over image tokens' states, [n, N]: a loss that teaches the decoder to look, never an answer."""
        logits: Tensor = self.asks(states) @ self.shows(images).T / 8
        return logits


class PhotoModel(nn.Module):
    """Projector, decoder and taps; the decoder's first layers are enough while it grows.

    Args:
        decoder: SmolLM2, frozen.
        tokenizer: its own.
        depths: after how many layers there is a tap.
        blind: hide the picture: image tokens are their position's code only.
        dtype: of the decoder; what is trained is kept in float32.
    """

    def __init__(
        self,
        decoder: LlamaForCausalLM,
        tokenizer: Tokenizer,
        depths: Sequence[int],
        blind: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        width = decoder.config.hidden_size
        self.tokenizer, self.blind = tokenizer, blind
        self.dtype = dtype
        self.decoder = decoder.to(dtype).requires_grad_(False)
        add_lora(decoder)
        scale = float(decoder.model.embed_tokens.weight.float().std())
        self.projector = Projector(width, scale)
        self.taps = nn.ModuleDict({str(depth): Tap(width) for depth in depths})
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        self.seg = tokenizer.token_to_id(SEG_IN_VOCABULARY)
        self._before = tokenizer.encode(BEFORE).ids
        self._ids: dict[str, list[int]] = {}

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def grow(self, depths: Iterable[int], before: int) -> None:
        """Start the taps of new depths from that of an older one."""
        for depth in depths:
            self.taps[str(depth)].load_state_dict(self.taps[str(before)].state_dict())

    def embed(self, ids: list[int]) -> Tensor:
        """Word embeddings of ids."""
        table: Any = self.decoder.model.embed_tokens
        found: Tensor = table(torch.tensor(ids))
        return found

    def image_tokens(self, cells: Tensor) -> Tensor:
        """Image tokens [N, H] of what the tower's levels hold for each cell [1, CELL, h, w]."""
        tokens: Tensor = self.projector(torch.zeros_like(cells) if self.blind else cells)[0]
        return tokens

    def name_tokens(self, tokens: Tensor, words: Sequence[str]) -> Tensor:
        """Logits [N, len(words)]: which word's embedding each image token is nearest to."""
        rows = [self.embed(self.tokenizer.encode(f" {word}").ids).float().mean(0) for word in words]
        table = functional.normalize(torch.stack(rows) - self._mean(), dim=-1)
        return self.sharpness * functional.normalize(tokens.float(), dim=-1) @ table.T

    def _mean(self) -> Tensor:
        if not hasattr(self, "_middle"):
            self._middle = self.decoder.model.embed_tokens.weight.float().mean(0)
        return self._middle

    def query_ids(self, text: str) -> list[int]:
        """The rest of the prompt after the image; its last token is the mask query: it predicts SEG."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(f"\n{text}{AFTER}").ids
        return self._ids[text]

    def read(
        self,
        tokens: Tensor,
        texts: Sequence[str],
        depths: Sequence[int],
        kept: Tensor | None = None,
        hint: Tensor | None = None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The states of the mask queries [n, H] and of the image tokens [N', H] after each depth, final-normed.

        Every query sees the picture and itself, as if it were alone.

        Args:
            tokens: [N, H], all image tokens.
            texts: the queries.
            depths: how many layers to run before each reading, ascending.
            kept: int64, the image tokens that are kept; their positions stay.
            hint: [n, N'], added to the attention logits of all words of a query on image tokens, from layer HINTED on.
        """
        texts_ids = [self.query_ids(text) for text in texts]
        start, count = len(self._before), len(tokens)
        places = torch.arange(count) if kept is None else kept
        shown = tokens[places].to(self.dtype)
        flat = [number for ids in texts_ids for number in ids]
        hidden = torch.cat([self.embed(self._before), shown, self.embed(flat)])[None]
        lengths = torch.tensor([len(ids) for ids in texts_ids])
        positions = torch.cat(
            [torch.arange(start), start + places, *(start + count + torch.arange(len(ids)) for ids in texts_ids)]
        )[None]
        owner = torch.cat(
            [torch.zeros(start + len(places)), torch.arange(1, len(texts) + 1).repeat_interleave(lengths)]
        )
        order = torch.arange(len(owner))
        seen = ((owner == owner[:, None]) | (owner == 0)) & (order <= order[:, None])
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, -30000.0)[None, None]
        model: Any = self.decoder.model
        rotary = model.rotary_emb(hidden, positions)
        ends = start + len(places) + lengths.cumsum(0) - 1
        hinted = mask
        if hint is not None:
            hinted = mask.clone()
            rows = torch.arange(start + len(places), len(owner))
            columns = torch.arange(start, start + len(places))
            hinted[0, 0, rows[:, None], columns] += hint[owner[rows].long() - 1].to(mask.dtype)
        found = {}
        done = 0
        for depth in depths:
            for number in range(done, depth):
                seen_by = mask if number < HINTED else hinted
                hidden = model.layers[number](
                    hidden, attention_mask=seen_by, position_ids=positions, position_embeddings=rotary
                )
            done = depth
            normed = model.norm(hidden)[0].float()
            found[depth] = normed[ends], normed[start : start + len(places)]
        return found


def faster_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, as those with matrix units do."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(400, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(20):
            start = time.process_time()
            functional.linear(x, weight)
            times.append(time.process_time() - start)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)
