"""Greedy generation that keeps the states, since masks are computed from the states that predicted [SEG]."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tokenprune_adapters.llava.prompt import DecoderInputs


@dataclass(frozen=True)
class Generated:
    """Answers of B prompts, T steps.

    Args:
        ids: new ids of each prompt, up to and including the end of sequence if it came.
        states: [B, T, H], final-norm states; `states[b, t]` predicted `ids[b][t]`.
    """

    ids: list[list[int]]
    states: Tensor

    def where(self, token: int) -> tuple[list[int], list[int]]:
        """Prompt numbers and steps at which a token was generated, prompt by prompt."""
        found = [(row, step) for row, ids in enumerate(self.ids) for step, new in enumerate(ids) if new == token]
        return [row for row, _ in found], [step for _, step in found]


def generate(
    decoder: LlamaForCausalLM, inputs: DecoderInputs, max_new_tokens: int, eos_ids: Collection[int]
) -> Generated:
    """Continue left-padded prompts greedily, with a KV cache, until all have ended.

    Args:
        decoder: the language model.
        inputs: prompts, padded on the left.
        max_new_tokens: maximum number of steps.
        eos_ids: ids that end an answer.
    """
    mask = inputs.attention_mask
    positions = inputs.positions
    assert positions is not None  # `splice` sets them if `continues`
    embeds, cache = inputs.inputs_embeds, None
    ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    ends = torch.tensor(sorted(eos_ids), device=mask.device)
    steps: list[Tensor] = []
    states: list[Tensor] = []
    lengths = [max_new_tokens] * len(mask)
    for step in range(max_new_tokens):
        output = decoder.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        state = output.last_hidden_state[:, -1].to(mask.device)
        token = decoder.lm_head(state).argmax(-1).to(mask.device)
        states.append(state)
        steps.append(token)
        for row in (torch.isin(token, ends) & ~ended).nonzero().flatten().tolist():
            lengths[row] = step + 1
            ended[row] = True
        if ended.all():
            break
        cache = output.past_key_values
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        embeds = decoder.get_input_embeddings()(token)[:, None]
    tokens = torch.stack(steps, dim=1).tolist()
    return Generated([ids[:length] for ids, length in zip(tokens, lengths, strict=True)], torch.stack(states, dim=1))
