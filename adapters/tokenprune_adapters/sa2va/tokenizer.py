"""Qwen2's tokenizer, with what Sa2VA adds to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]  # an alias in release 5

from tokenprune.errors import CheckpointError
from tokenprune.plugins.attribution import brief
from tokenprune_adapters.common.tokenizer import check_unicode

FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


class QwenTokenizer:
    """Text to ids and back, as `LlamaSlowTokenizer` does for LLaMA.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer
        self.added: dict[str, int] = dict(tokenizer.get_added_vocab())
        self._names = {i: token for token, i in self.added.items()}
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._control = {self.eos_id, self.pad_id}

    def __len__(self) -> int:
        """One more than the largest id."""
        return len(self._inner)

    def token_id(self, token: str) -> int | None:
        """The id of an added token; None if there is no such token."""
        return self.added.get(token)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; added tokens in it become theirs. Qwen2 has no beginning of a sequence, so `bos` says nothing.

        Raises:
            InputError: a text that is not valid Unicode.
        """
        check_unicode(text)
        return list(self._inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of ids.

        Args:
            ids: ids as from `encode`.
            skip_control: omit the end of a sequence, and padding.
        """
        shown = [i for i in ids if not (skip_control and i in self._control)]
        text: str = self._inner.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's piece of each id."""
        found: list[str] = self._inner.convert_ids_to_tokens(list(ids))
        return found


def load_tokenizer(folder: Path, required: Iterable[str], rows: int) -> QwenTokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: contains `tokenizer.json`, or `vocab.json` and `merges.txt`.
        required: added tokens that the model needs.
        rows: number of rows of the embedding table.

    Raises:
        CheckpointError: the files are missing or damaged, a required token is missing, or an id has no row.
    """
    if not any(all((folder / file).is_file() for file in files) for files in FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, nor vocab.json with merges.txt; put the tokenizer of the checkpoint there"
        )
    try:
        tokenizer = QwenTokenizer(Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # transformers and tokenizers raise many types on damaged files
        raise CheckpointError(f"the tokenizer of {folder} cannot be read ({brief(error)}); fetch it again") from error
    missing = [token for token in required if tokenizer.token_id(token) is None]
    if missing:
        raise CheckpointError(
            f"the tokenizer of {folder} lacks {', '.join(missing)}; use the tokenizer files that belong to the "
            "checkpoint"
        )
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids, but the embedding table has {rows} rows; "
            "use the tokenizer files that belong to the checkpoint"
        )
    return tokenizer
