"""Greedy generation that keeps the states, since masks are computed from the states that predicted [SEG].

An answer is usually known in advance but for the mask ("Sure, it is [SEG]."). The expected tokens are appended to the
prompt, and one forward gives the model's own choice at each: as many as agree are accepted, as in speculative decoding,
and the first choice that differs replaces the expected token. The text is that of decoding token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from tokenprune_adapters.llava.draft import NewTokens
from tokenprune_adapters.llava.prompt import DecoderInputs

Expect = Callable[[int, Sequence[int]], list[int]]
"""The ids that are expected to follow an answer's first ids: (batch row, ids so far) -> ids."""


def never(said: Sequence[int]) -> bool:
    """Only an id ends an answer."""
    return False


def nothing_expected(row: int, said: Sequence[int]) -> list[int]:
    """Decode token by token."""
    return []


@dataclass(frozen=True)
class Generated:
    """Answers of B prompts, T steps.

    Args:
        ids: new ids of each prompt, up to and including the end of sequence if it came.
        states: [B, T, H], final-norm states; `states[b, t]` predicted `ids[b][t]`, zeros after the end.
        forwards: of the decoder, the prefill included; T without drafts.
    """

    ids: list[list[int]]
    states: Tensor
    forwards: int = 0

    def where(self, token: int) -> tuple[list[int], list[int]]:
        """Prompt numbers and steps at which a token was generated, prompt by prompt."""
        found = [(row, step) for row, ids in enumerate(self.ids) for step, new in enumerate(ids) if new == token]
        return [row for row, _ in found], [step for _, step in found]


def generate(
    decoder: LlamaForCausalLM,
    inputs: DecoderInputs,
    max_new_tokens: int,
    eos_ids: Collection[int],
    expect: Expect = nothing_expected,
    ends: Callable[[Sequence[int]], bool] = never,
) -> Generated:
    """Continue left-padded prompts greedily, with a KV cache, until all have ended.

    Args:
        decoder: the language model, without sliding windows: rejected tokens stay in the cache, masked.
        inputs: prompts, padded on the left; with drafted answers from `with_drafts`, or without.
        max_new_tokens: maximum length of an answer.
        eos_ids: ids that end an answer.
        expect: what to draft after the first forward.
        ends: whether an answer, ids so far, ends with its last id, though that id is none of `eos_ids`.
    """
    assert inputs.positions is not None  # `splice` sets them if `continues`
    rows = range(len(inputs.token_ids))
    marks = inputs.drafted
    drafts: list[list[int]] = [[] if marks is None else inputs.token_ids[row][marks[row]].tolist() for row in rows]
    width = 0 if marks is None else max(map(len, drafts))
    embeds, mask, positions, cache = inputs.inputs_embeds, inputs.attention_mask, inputs.positions, None
    first = positions[:, -1 - width] + 1  # of the answer
    said: list[list[int]] = [[] for _ in rows]
    ended = [False for _ in rows]
    states: list[list[Tensor]] = [[] for _ in rows]
    forwards = 0
    while True:
        output = decoder.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        forwards += 1
        cache = output.past_key_values
        found = output.last_hidden_state[:, -1 - width :].to(mask.device)  # [B, 1 + width, H]
        chosen = decoder.lm_head(found).argmax(-1).tolist()
        mask = mask.clone()
        for row in rows:
            if ended[row]:
                continue
            agreed = _agreed(drafts[row], chosen[row])
            new = chosen[row][: agreed + 1][: max_new_tokens - len(said[row])]
            stops = [step for step, token in enumerate(new) if token in eos_ids or ends([*said[row], *new[: step + 1]])]
            new = new[: stops[0] + 1] if stops else new
            said[row] += new
            states[row].append(found[row, : len(new)])
            ended[row] = bool(stops) or len(said[row]) >= max_new_tokens
            if width:  # rejected tokens stay in the cache, but nothing attends to them
                mask[row, mask.shape[1] - width + agreed :] = 0
        if all(ended):
            break
        drafts = [[] if ended[row] else expect(row, said[row])[: max_new_tokens - len(said[row]) - 1] for row in rows]
        # the last choice has not been an input yet; rows that have ended get padding
        pending = [[] if ended[row] else [said[row][-1], *drafts[row]] for row in rows]
        width = max(map(len, drafts))
        last = torch.tensor([len(ids) - 1 for ids in said], device=first.device)
        step = NewTokens.of(pending, first + last)
        mask = torch.cat([mask, step.valid.to(mask.dtype)], 1)
        positions, embeds = step.positions, decoder.get_input_embeddings()(step.ids)
    return Generated(said, pad_sequence([torch.cat(parts) for parts in states], batch_first=True), forwards)


def _agreed(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens of a draft the model would have said."""
    for step, token in enumerate(draft):
        if token != chosen[step]:
            return step
    return len(draft)
