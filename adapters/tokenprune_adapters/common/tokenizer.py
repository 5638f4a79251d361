"""LLaMA's sentencepiece tokenizer with added tokens, with the ids that the LLaVA-1 generation was trained on.

Those models were trained with the slow tokenizer of transformers 4.31, whose added tokens strip the white space on both
sides, and where text after an added token starts a new word. Newer tokenizers produce other ids from the same files,
which shifts the mask query. This one runs sentencepiece directly, so its ids do not depend on the release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor

from tokenprune.errors import CheckpointError, InputError
from tokenprune.utils.arguments import unicode_problem
from tokenprune_adapters.common.checkpoint import read_json


class TextTokenizer(Protocol):
    """What segmentation models ask of a tokenizer."""

    eos_id: int
    pad_id: int

    def __len__(self) -> int:
        """One more than the largest id."""

    def token_id(self, token: str) -> int | None:
        """The id of an added or control token; None if there is no such token."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, with the beginning-of-sequence id of a model that has one."""

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of ids."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's piece of each id."""


def check_unicode(text: str) -> None:
    """Raise InputError for a text that is not valid Unicode, which tokenizers cannot encode."""
    problem = unicode_problem(text)
    if problem:
        raise InputError(f"text {text[-60:]!a} {problem}")


class LlamaSlowTokenizer:
    """Text to ids and back.

    Args:
        model_file: sentencepiece model (`tokenizer.model`).
        added: tokens outside the sentencepiece model and their ids.

    Raises:
        CheckpointError: the model file cannot be read.
    """

    def __init__(self, model_file: Path, added: dict[str, int]) -> None:
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.Load(str(model_file))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{model_file} is not a sentencepiece model ({error}); fetch it again") from error
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.unk_id: int = self._pieces.unk_id()
        self.pad_id: int = self.unk_id
        # Control tokens in a text become their ids too, but keep the white space around them.
        control = {self._pieces.IdToPiece(i): i for i in (self.unk_id, self.bos_id, self.eos_id) if i >= 0}
        self.added = {token: i for token, i in added.items() if token not in control}
        self._special = {**control, **self.added}
        self._names = {i: token for token, i in self._special.items()}
        self._split = re.compile(
            "|".join(
                rf"\s*{re.escape(token)}\s*" if token in self.added else re.escape(token)
                for token in sorted(self._special, key=len, reverse=True)
            )
        )

    def __len__(self) -> int:
        """One more than the largest id."""
        return max([self._pieces.GetPieceSize(), *(i + 1 for i in self.added.values())])

    def token_id(self, token: str) -> int | None:
        """The id of an added or control token; None if there is no such token."""
        return self._special.get(token)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            text: any text; added and control tokens in it become their ids.
            bos: start with the beginning-of-sequence id.

        Raises:
            InputError: a text that is not valid Unicode.
        """
        check_unicode(text)
        ids = [self.bos_id] if bos else []
        start = 0
        for found in self._split.finditer(text):
            ids += self._pieces.EncodeAsIds(text[start : found.start()])
            ids.append(self._special[found.group().strip()])
            start = found.end()
        ids += self._pieces.EncodeAsIds(text[start:])
        return ids

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of ids; added tokens are surrounded by spaces.

        Args:
            ids: ids as from `encode`.
            skip_control: omit <s>, </s> and <unk>.
        """
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if i not in self._names:
                run.append(i)
                continue
            parts.append(self._pieces.DecodeIds(run))
            run = []
            if self._names[i] in self.added or not skip_control:
                parts.append(self._names[i])
        parts.append(self._pieces.DecodeIds(run))
        return " ".join(part.strip() for part in parts if part.strip())

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's piece of each id ("▁" marks the start of a word)."""
        return [self._names[i] if i in self._names else str(self._pieces.IdToPiece(i)) for i in ids]


def load_tokenizer(folder: Path, required: Iterable[str] = (), rows: int | None = None) -> LlamaSlowTokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: contains `tokenizer.model` and, for the added tokens, `added_tokens.json` or the `added_tokens_decoder`
            of `tokenizer_config.json`.
        required: added tokens that the model needs.
        rows: number of rows of the embedding table.

    Raises:
        CheckpointError: no `tokenizer.model`, a required token is missing, or an id has no row in the embedding table.
    """
    model_file = folder / "tokenizer.model"
    if not model_file.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.model; put the sentencepiece model of the checkpoint there")
    tokenizer = LlamaSlowTokenizer(model_file, _added_tokens(folder))
    missing = [token for token in required if tokenizer.token_id(token) is None]
    if missing:
        raise CheckpointError(
            f"the tokenizer of {folder} lacks {', '.join(missing)} (added tokens: "
            f"{', '.join(tokenizer.added) or 'none'}); use the tokenizer files that belong to the checkpoint"
        )
    if rows is not None and len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids, but the embedding table has {rows} rows; "
            "use the tokenizer files that belong to the checkpoint"
        )
    return tokenizer


def _added_tokens(folder: Path) -> dict[str, int]:
    added: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        entries = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added.update({str(entry["content"]): int(i) for i, entry in entries.items()})
    if (folder / "added_tokens.json").is_file():
        added.update({str(token): int(i) for token, i in read_json(folder / "added_tokens.json").items()})
    return added
