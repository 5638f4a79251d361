"""Many queries about one image in one pass: the decoder's layers run on a shared prefix and on all queries behind it.

Every query sees the system prompt, the image and itself, at the positions that it would have alone, so the states
equal those of one row per query through LlamaModel. Ours; training only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def forward_packed(
    decoder: LlamaForCausalLM,
    head: Tensor,
    image: Tensor,
    tail: Tensor,
    queries: Tensor,
    taps: tuple[int, ...],
    blind: bool = False,
    watch: tuple[int, ...] = (),
    last: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """States of all queries' tokens, final norm applied, after each layer count in `taps`: list of [B, n, T, H].

    The second result holds, for each layer of `watch` (counted from 1), the log of the attention that the first head
    pays from the mask query to the image tokens: [B, n, I]. The third holds the image tokens' own states, final norm
    applied, after each layer count in `taps` but the last layer's: [B, I, H].

    Args:
        head: ids [S] before the image.
        image: embeddings [B, I, H].
        tail: ids [E] behind the image, shared by the queries.
        queries: ids [B, n, T].
        blind: hide the image tokens from all other tokens.
        last: position of the mask query in each query, [B, n]; needed for `watch`.
    """
    model = decoder.model
    rows, count, length = queries.shape
    sizes = (len(head), image.shape[1], len(tail))
    prefix = sum(sizes)
    shared = model.embed_tokens(torch.cat([head, tail]))
    front = torch.cat([shared[: sizes[0]].expand(rows, -1, -1), image, shared[sizes[0] :].expand(rows, -1, -1)], dim=1)
    hidden = torch.cat([front, model.embed_tokens(queries).flatten(1, 2).to(front.dtype)], dim=1)
    positions = torch.cat([torch.arange(prefix), torch.arange(prefix, prefix + length).repeat(count)])[None]
    cos, sin = model.rotary_emb(hidden.float(), positions)
    prefix_mask, query_mask = _masks(sizes, count, length, blind)
    results: list[Tensor] = []
    watched: list[Tensor] = []
    shown: list[Tensor] = []
    for index, layer in enumerate(model.layers, start=1):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (rows, normed.shape[1], -1, attention.head_dim)
        q, k, v = (
            p(normed).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
        if index in watch and last is not None:
            own = torch.arange(count) * length + last
            row = q[:, 0, prefix:].gather(1, own[..., None].expand(-1, -1, q.shape[-1]))
            scores = (row @ k[:, 0].transpose(1, 2)).float() * attention.scaling + query_mask[own]
            watched.append(scores.log_softmax(-1)[..., sizes[0] : sizes[0] + sizes[1]])
        first = functional.scaled_dot_product_attention(
            q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], attn_mask=prefix_mask.to(q.dtype)
        )
        second = functional.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=query_mask.to(q.dtype))
        mixed = torch.cat([first, second], dim=2).transpose(1, 2).flatten(2)
        if index == len(model.layers):  # nothing reads the prefix after the last attention
            hidden, mixed = hidden[:, prefix:], mixed[:, prefix:]
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if index in taps:
            states = hidden if index == len(model.layers) else hidden[:, prefix:]
            results.append(model.norm(states).view(rows, count, length, -1))
            if index < len(model.layers):
                shown.append(model.norm(hidden[:, sizes[0] : sizes[0] + sizes[1]]))
    return results, watched, shown


def _masks(sizes: tuple[int, int, int], count: int, length: int, blind: bool) -> tuple[Tensor, Tensor]:
    """Additive masks of the prefix [P, P] and of the queries [n·T, P + n·T]."""
    prefix = sum(sizes)
    is_image = torch.zeros(prefix, dtype=torch.bool)
    is_image[sizes[0] : sizes[0] + sizes[1]] = True
    seen = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    if blind:
        seen &= ~is_image[None] | is_image[:, None]
    own = torch.ones(length, length, dtype=torch.bool).tril()
    block = torch.block_diag(*[own] * count).bool()
    before = (~is_image if blind else torch.ones_like(is_image)).expand(count * length, -1)
    seen_by_queries = torch.cat([before, block], dim=1)
    return tuple(torch.zeros(m.shape).masked_fill(~m, -1e4) for m in (seen, seen_by_queries))  # type: ignore[return-value]
