"""Prompts of the LLaVA-1 generation: the conversation template, the image placeholder, the decoder input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenprune.errors import InputError
from tokenprune_adapters.common.tokenizer import TextTokenizer

IMAGE_PLACEHOLDER = "<image>"
IMAGE_ID = -200  # stands for the image in token ids; outside every vocabulary
IM_START, IM_END = "<im_start>", "<im_end>"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def conversation(question: str, answer: str | None = None) -> str:
    """One turn in the template `llava_v1`; without an answer, the model continues the prompt."""
    return dialogue([(question, answer)])


def dialogue(turns: Sequence[tuple[str, str | None]]) -> str:
    """Turns of question and answer in the template `llava_v1`; without the last answer, the model continues it."""
    said = (f"USER: {ask} ASSISTANT:" + ("" if reply is None else f" {reply}</s>") for ask, reply in turns)
    return f"{SYSTEM} {''.join(said)}"


def questions(prompt: str) -> list[str]:
    """The user's text in each turn of a whole prompt, without image placeholder and markers; a prompt without turns is
    one turn."""
    turns = re.findall(r"USER:(.*?)(?:ASSISTANT:|$)", prompt, re.DOTALL) or [prompt]
    mark = re.compile(f"(?:{re.escape(IM_START)})?{re.escape(IMAGE_PLACEHOLDER)}(?:{re.escape(IM_END)})?")
    return [mark.sub("", turn).strip() for turn in turns]


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Ids of a prompt, with `IMAGE_ID` for the image. The texts before and after the image are tokenized separately.

    Raises:
        InputError: not exactly one `<image>`.
    """
    pieces = prompt.split(IMAGE_PLACEHOLDER)
    if len(pieces) != 2:
        raise InputError(
            f"the prompt contains {IMAGE_PLACEHOLDER} {len(pieces) - 1} times, expected it once, for the image: "
            f"{prompt[:80]!r}"
        )
    before, after = pieces
    return [*tokenizer.encode(before), IMAGE_ID, *tokenizer.encode(after, bos=False)]


@dataclass(frozen=True)
class DecoderInputs:
    """The inputs of a decoder prefill, and the roles of its positions. B prompts, S positions.

    Args:
        inputs_embeds: [B, S, H].
        attention_mask: int64 [B, S], 0 on padding.
        token_ids: int64 [B, S], `IMAGE_ID` on every image token, the padding id on padding.
        image_tokens: bool [B, S].
        seg: bool [B, S], positions of [SEG] tokens.
        mask_query: bool [B, S], the position before each [SEG], whose final state becomes the mask embedding.
        positions: int64 [B, S], 0 at the first token of a row; None = arange, the decoder's default.
        drafted: bool [B, S], the tokens of an expected answer after the prompt; None = there are none.
        shared: how many columns from the first token of a row on are the same in all rows.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    token_ids: Tensor
    image_tokens: Tensor
    seg: Tensor
    mask_query: Tensor
    positions: Tensor | None = None
    drafted: Tensor | None = None
    shared: int = 0


def splice(
    prompts: Sequence[Sequence[int]],
    image_embeddings: Tensor,
    embed_tokens: nn.Module,
    seg_ids: Sequence[int],
    continues: bool = False,
    pad_id: int = 0,
    image_valid: Tensor | None = None,
) -> DecoderInputs:
    """Decoder inputs of several prompts about one image.

    Args:
        prompts: ids of each prompt, with `IMAGE_ID` once.
        image_embeddings: [1, N, H] of the image, the same for all prompts.
        embed_tokens: the decoder's embedding table.
        seg_ids: ids of the mask tokens.
        continues: whether the model continues the prompts: then padding is on the left, and the mask query is the last
            position, the first that could predict a [SEG].
        pad_id: id whose embedding fills the (masked) padding.
        image_valid: bool [1, N], False for image tokens that are masked. They keep their position, and count as
            padding, not as image tokens.
    """
    count = image_embeddings.shape[1]
    device = image_embeddings.device
    expanded = []
    for ids in prompts:
        at = list(ids).index(IMAGE_ID)
        expanded.append(torch.tensor([*ids[:at], *[IMAGE_ID] * count, *ids[at + 1 :]], device=device))
    padding = "left" if continues else "right"
    token_ids = pad_sequence(expanded, batch_first=True, padding_value=pad_id, padding_side=padding)
    lengths = [torch.ones_like(ids) for ids in expanded]
    attention_mask = pad_sequence(lengths, batch_first=True, padding_value=0, padding_side=padding)
    image_tokens = token_ids == IMAGE_ID
    text = embed_tokens(token_ids.masked_fill(image_tokens, pad_id))
    # Every row has N image tokens, so one scatter writes the same N embeddings, in order, to each row.
    rows = image_embeddings.to(text.dtype).expand(len(expanded), -1, -1)
    inputs_embeds = text.masked_scatter(image_tokens[..., None], rows)
    seg = torch.isin(token_ids, torch.tensor(list(seg_ids), device=device)) & attention_mask.bool()
    mask_query = torch.zeros_like(seg)
    if continues:
        mask_query[:, -1] = True
    else:
        mask_query[:, :-1] = seg[:, 1:]
    positions = None
    if continues or image_valid is not None:
        steps = torch.arange(token_ids.shape[1], device=device).expand_as(token_ids)
        positions = (steps - attention_mask.argmax(1, keepdim=True)).clamp(min=0)
    if image_valid is not None:
        shown = image_valid.to(device).expand(len(expanded), -1)
        attention_mask = attention_mask.masked_scatter(image_tokens, shown.to(attention_mask.dtype))
        image_tokens = image_tokens & attention_mask.bool()
    same = list(takewhile(lambda ids: len({*ids}) == 1, zip(*prompts, strict=False)))
    shared = sum(count if ids[0] == IMAGE_ID else 1 for ids in same)
    return DecoderInputs(
        inputs_embeds, attention_mask, token_ids, image_tokens, seg, mask_query, positions, shared=shared
    )
