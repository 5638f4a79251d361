"""Prompts and tokenizer of the photo models: SmolLM2's chat, with [SEG] for a control token that it never used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from tokenprune_adapters.common.tokenizer import check_unicode
from tokenprune_adapters.llava.prompt import IMAGE_PLACEHOLDER

SEG, SEG_IN_VOCABULARY = "[SEG]", "<empty_output>"
TURN, END = "<|im_start|>", "<|im_end|>"
BEFORE, AFTER = f"{TURN}user\n", f"{END}\n{TURN}assistant\n"


class ChatTokenizer:
    """A tokenizer of the package `tokenizers` with the methods that segmentation models call.

    Args:
        tokenizer: with the control tokens of SmolLM2.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer
        end = tokenizer.token_to_id(END)
        assert end is not None
        self.eos_id: int = end
        self.pad_id: int = end

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return int(self.inner.get_vocab_size())

    def token_id(self, token: str) -> int | None:
        """The id of a token; None if there is no such token."""
        found: int | None = self.inner.token_to_id(SEG_IN_VOCABULARY if token == SEG else token)
        return found

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; control tokens and [SEG] in it become their ids. Nothing is put before it, whatever `bos`.

        Raises:
            InputError: a text that is not valid Unicode.
        """
        check_unicode(text)
        ids: list[int] = self.inner.encode(text.replace(SEG, SEG_IN_VOCABULARY)).ids
        return ids

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of ids; with `skip_control` without control tokens but [SEG]."""
        seg = self.token_id(SEG)
        parts: list[str] = []
        run: list[int] = []
        for number in ids:
            if number == seg:
                parts += [self.inner.decode(run, skip_special_tokens=skip_control), SEG]
                run = []
            else:
                run.append(number)
        parts.append(self.inner.decode(run, skip_special_tokens=skip_control))
        return "".join(parts).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's piece of each id ("Ġ" marks the start of a word)."""
        seg = self.token_id(SEG)
        return [SEG if number == seg else str(self.inner.id_to_token(number)) for number in ids]


def forced(query: str) -> str:
    """The whole prompt for a query, with the answer that asks for the mask."""
    return f"{BEFORE}{IMAGE_PLACEHOLDER}\n{query}{AFTER}{SEG}"


def asked(prompt: str) -> list[str]:
    """The user's text in each turn of a whole prompt, without the image; a prompt without turns is one turn."""
    turns = re.findall(rf"{re.escape(BEFORE)}(.*?){re.escape(END)}", prompt, re.DOTALL) or [prompt]
    return [turn.replace(IMAGE_PLACEHOLDER, "").strip() for turn in turns]
