"""Expected answers after a prompt, whose tokens a single forward checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenprune_adapters.llava.prompt import DecoderInputs


def with_drafts(inputs: DecoderInputs, drafts: Sequence[Sequence[int]], embed_tokens: nn.Module) -> DecoderInputs:
    """Prompts that the model continues, each followed by an expected answer.

    The drafted tokens take the positions that they would have if they were generated. Rows with a shorter draft are
    padded on the right.

    Args:
        inputs: B prompts, padded on the left, from `splice(…, continues=True)`.
        drafts: ids of each row's expected answer; may be empty.
        embed_tokens: the decoder's embedding table.
    """
    if not any(drafts):
        return inputs
    assert inputs.positions is not None  # `splice` sets them if `continues`
    new = NewTokens.of(drafts, inputs.positions[:, -1] + 1)
    marks = torch.zeros_like(new.valid)
    return replace(
        inputs,
        inputs_embeds=torch.cat([inputs.inputs_embeds, embed_tokens(new.ids).to(inputs.inputs_embeds)], 1),
        attention_mask=torch.cat([inputs.attention_mask, new.valid.to(inputs.attention_mask.dtype)], 1),
        token_ids=torch.cat([inputs.token_ids, new.ids], 1),
        image_tokens=torch.cat([inputs.image_tokens, marks], 1),
        seg=torch.cat([inputs.seg, marks], 1),  # masks are made from what the model says, not from the draft
        mask_query=torch.cat([inputs.mask_query, marks], 1),
        positions=torch.cat([inputs.positions, new.positions], 1),
        drafted=torch.cat([torch.zeros_like(inputs.image_tokens), new.valid], 1),
    )


class NewTokens:
    """Tokens to append to each row of a batch, padded on the right.

    Args:
        ids: int64 [B, k], 0 on padding.
        valid: bool [B, k], False on padding.
        positions: int64 [B, k].
    """

    def __init__(self, ids: Tensor, valid: Tensor, positions: Tensor) -> None:
        self.ids, self.valid, self.positions = ids, valid, positions

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], first: Tensor) -> NewTokens:
        """The given ids of each row.

        Args:
            tokens: of each row; a row may have none.
            first: int64 [B], the position of a row's first one.
        """
        width = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], device=first.device)
        steps = torch.arange(width, device=first.device)
        lengths = torch.tensor([len(row) for row in tokens], device=first.device)[:, None]
        # padding repeats the position before it, so that positions never fall
        positions = first[:, None] + torch.minimum(steps.expand(len(tokens), -1), (lengths - 1).clamp(min=0))
        return cls(ids, steps < lengths, positions)
