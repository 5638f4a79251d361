"""Token ids of the tokenizer that the models were trained with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import CheckpointError, InputError
from tokenprune_adapters.common.tokenizer import LlamaSlowTokenizer, load_tokenizer
from tokenprune_adapters.llava.prompt import prompt_ids

DATA = Path(__file__).parents[1] / "data" / "llava_tokenizer"
GROUPS = json.loads((DATA / "ids.json").read_text(encoding="utf-8"))["groups"]
CASES = [(group, case) for group in GROUPS for case in group["cases"]]
ADDED = GROUPS[0]["added_token_ids"]
TOKENIZER = LlamaSlowTokenizer(DATA / "tokenizer.model", ADDED)


@pytest.mark.parametrize(("group", "case"), CASES, ids=[f"{g['tokenizer']}-{c['text'][-30:]}" for g, c in CASES])
def test_ids_equal_the_original_tokenizer(group: dict[str, Any], case: dict[str, Any]) -> None:
    tokenizer = LlamaSlowTokenizer(DATA / "tokenizer.model", group["added_token_ids"])
    assert len(tokenizer) == group["vocab_size_with_added"]
    found = tokenizer.encode(case["text"]) if case["kind"] == "text" else prompt_ids(tokenizer, case["text"])
    assert found == case["ids"]


def test_checkpoint_folders_give_the_same_tokenizers(golden: Callable[[str], Path]) -> None:
    for group in GROUPS:
        tokenizer = load_tokenizer(golden(group["tokenizer"]) / "checkpoint", group["added_token_ids"])
        assert tokenizer.added == group["added_token_ids"]


def test_added_tokens_may_stand_in_the_newer_config_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizer.model").read_bytes())
    entries = {"0": {"content": "<unk>"}, "2": {"content": "</s>"}, "640": {"content": "[SEG]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.added == {"[SEG]": 640}
    assert tokenizer.encode("It is [SEG] .</s>") == [1, 361, 280, 640, 582, 605, 2]


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<>[]", exclude_categories=("Cc",)), max_size=12)


@given(st.lists(PLAIN, min_size=1, max_size=4), st.data())
def test_white_space_around_added_tokens_never_matters(texts: list[str], data: st.DataObject) -> None:
    tokens = [data.draw(st.sampled_from(sorted(ADDED))) for _ in texts[1:]]
    spaces = [data.draw(st.sampled_from(["", " ", "  ", "\n", " \t"])) for _ in range(2 * len(tokens))]
    texts = [text.strip() for text in texts]
    tight, loose = texts[0], texts[0]
    for number, (token, text) in enumerate(zip(tokens, texts[1:], strict=True)):
        tight += token + text
        loose += spaces[2 * number] + token + spaces[2 * number + 1] + text
    ids = TOKENIZER.encode(loose)
    assert ids == TOKENIZER.encode(tight)
    assert [i for i in ids if i in ADDED.values()] == [ADDED[token] for token in tokens]
    pieces = [i for text in texts for i in TOKENIZER.encode(text, bos=False)]
    assert [i for i in ids if i not in ADDED.values()] == [1, *pieces]


def test_decoding_gives_the_words_back() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("Sure, it is [SEG].</s>")) == "Sure, it is [SEG] ."
    assert TOKENIZER.decode([1, 640, 2], skip_control=False) == "<s> [SEG] </s>"
    assert TOKENIZER.pieces([1, 361, 640]) == ["<s>", "▁It", "[SEG]"]


@pytest.mark.parametrize("prompt", ["no image", "<image> and <image>"])
def test_a_prompt_has_one_image(prompt: str) -> None:
    with pytest.raises(InputError, match="expected it once"):
        prompt_ids(TOKENIZER, prompt)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizer.model").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks \[SEG\]"):
        load_tokenizer(tmp_path, ["[SEG]"])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[SEG]": 640}))
    with pytest.raises(CheckpointError, match="641 ids, but the embedding table has 640 rows"):
        load_tokenizer(tmp_path, ["[SEG]"], rows=640)
