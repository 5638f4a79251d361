"""The tokenizer of lisa-tiny: a sentencepiece model trained on the prompts themselves, in LLaMA's slow file format."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from scenes import VERSION

from tokenprune.datasets.shapes import KINDS
from tokenprune.datasets.shapes.dataset import scene_generator
from tokenprune.datasets.shapes.queries import sample_queries
from tokenprune.datasets.shapes.scenes import draw_scene
from tokenprune_adapters.common.tokenizer import LlamaSlowTokenizer
from tokenprune_adapters.lisa import LisaModel
from tokenprune_adapters.segmentation.queries import SENTENCE, forced_prompt

ANSWER = LisaModel.forced_answer
ADDED_TOKENS = ("[SEG]", "<im_start>", "<im_end>")  # LISA's order
# Words that no query of the dataset has, so that free text does not fall into bytes altogether.
EXTRA = (
    "which what where object objects color same different every all one two three four five big little upper lower "
    "top left right bottom between next to near far from farthest behind and or both but it its of on at a an are "
    "has have find show segment pink black brown grey heart arrow box ball"
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 ,.;:!?'()-"


def corpus(scenes: int = 300) -> list[str]:
    lines = [SENTENCE.format(EXTRA), ANSWER, ALPHABET]
    for index in range(scenes):
        rng = scene_generator("train", 1, index)
        objects = draw_scene(rng).objects
        for kind in KINDS:
            for text, _ in sample_queries(rng, objects, kind, 3, VERSION):
                prompt = forced_prompt(text, False, True, ANSWER)
                for token in ("<im_start>", "<image>", "<im_end>", "[SEG]", "</s>"):
                    prompt = prompt.replace(token, " ")
                lines.extend(prompt.split("\n"))
    return lines + EXTRA.split() * 20


def train_vocabulary(folder: Path) -> None:
    """Write tokenizer.model and the three JSON files beside it into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=800,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink(missing_ok=True)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    special = {
        name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 512,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
    _write(folder / "added_tokens.json", {token: size + i for i, token in enumerate(ADDED_TOKENS)})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


class Prompts:
    """Token ids of training prompts, cut where all of them agree.

    `head`: ids before the image; `tail`: ids after it that every phrase query shares (up to "What is the");
    `query(text)`: the rest up to and including the mask query; `answer`: "[SEG].</s>".
    """

    def __init__(self, tokenizer: LlamaSlowTokenizer) -> None:
        self.encode = tokenizer.encode
        self.cache: dict[str, list[int]] = {}
        first = self._ids("the red star")
        other = self._ids("the leftmost thing")
        image = self.encode("<im_start>", bos=False)[-1]
        self.head = first[: first.index(image) + 1]
        rest = [row[len(self.head) :] for row in (first, other)]
        shared = next(i for i, (a, b) in enumerate(zip(*rest, strict=False)) if a != b)
        self.tail = rest[0][:shared]
        seg = self.encode("[SEG]", bos=False)[-1]
        self.answer = first[first.index(seg) :]
        one, two = self.query("the red star"), self.query("the leftmost thing")
        self.template = next(n for n in range(1, len(one)) if one[-n - 1] != two[-n - 1])

    def _ids(self, text: str) -> list[int]:
        before, after = forced_prompt(text, False, True, ANSWER).split("<image>")
        return [*self.encode(before), *self.encode(after, bos=False)]

    def query(self, text: str) -> list[int]:
        if text not in self.cache:
            ids = self._ids(text)
            start = len(self.head) + len(self.tail)
            if ids[:start] != self.head + self.tail or ids[-len(self.answer) :] != self.answer:
                raise ValueError(f"the prompt of {text!r} does not share the common tokens")
            self.cache[text] = ids[start : -len(self.answer)]
        return self.cache[text]

    def short(self, text: str) -> list[int]:
        ids = self.query(text)
        return [*ids[: -self.template], ids[-1]]
