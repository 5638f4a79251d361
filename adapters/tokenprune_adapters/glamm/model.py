"""GLaMM on transformers' own classes: several queries about an image as one conversation, and grounded answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from tokenprune.core.strategy import Strategy
from tokenprune.errors import UnsupportedError
from tokenprune_adapters.glamm import prompts as glamm_prompts
from tokenprune_adapters.glamm.prompts import PHRASE_END, PHRASE_START, REGION_TOKENS, SEG_TOKEN
from tokenprune_adapters.glamm.results import GroundedSegmentation, phrase_span
from tokenprune_adapters.llava.prompt import dialogue
from tokenprune_adapters.segmentation.data import Answered, Segmentation
from tokenprune_adapters.segmentation.drafts import Draft
from tokenprune_adapters.segmentation.queries import as_list, checked_query, sentence_flags
from tokenprune_adapters.segmentation.sam.masks import MaskSize
from tokenprune_adapters.segmentation.sam.segmenter import SamSegmenter


class GlammModel(SamSegmenter):
    """A loaded GLaMM; see `SamSegmenter` for the other arguments.

    Args:
        template_seed: seed of the templates that queries are put into; an attribute, which may be changed.
        left_out: prefixes of the checkpoint's tensors that were not loaded, such as the region encoder's.
        parts: as in `SamSegmenter`.
    """

    seg_tokens = (SEG_TOKEN,)

    def __init__(self, *, template_seed: int = 0, left_out: Sequence[str] = (), **parts: Any) -> None:
        super().__init__(**parts)
        self.template_seed = template_seed
        self.left_out = tuple(left_out)

    one_conversation = True
    """Several forced queries are turns of one conversation."""

    @torch.inference_mode()
    def segment(
        self,
        image: Any,
        query: str | Sequence[str] | None = None,
        strategy: Strategy | None = None,
        answer: Literal["forced", "generate"] = "forced",
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 64,
        is_sentence: bool | Sequence[bool] | None = None,
        draft: Draft = True,
        mask_size: MaskSize = "image",
        boxes: object = None,
    ) -> GroundedSegmentation:
        """Masks for one query, or several, about one image; otherwise as `Segmenter.segment`.

        Args:
            image: a path, PIL image, numpy array or tensor; or what `encode_image` gave.
            query: forced, several queries become turns of one conversation, as in the authors' referring evaluation:
                one batch row, in which later masks see earlier answers. With "generate" each is a conversation of its
                own. A phrase goes into a template, drawn by `template_seed` and the phrase; a sentence is asked as
                LISA asks it, and when generating as it is (ours).
            strategy: a `tokenprune.Strategy`; None leaves the decoder untouched.
            answer: "forced" or "generate".
            prompt: instead of a query, a whole prompt, with as many turns as wanted.
            max_new_tokens: limit of a generated answer. A grounded description of a whole image takes a few hundred.
            is_sentence: whether each query is a sentence.
            draft: as in `Segmenter.segment`.
            mask_size: as in `Segmenter.segment`.
            boxes: regions to talk about; not supported, since the region encoder is left out.

        Raises:
            UnsupportedError: boxes were given.
            InputError: see `Segmenter.segment`.
            OptionError: see `Segmenter.segment`.
        """
        if boxes is not None:
            raise UnsupportedError(
                "boxes= was given, but GLaMM's region encoder is left out, so that regions cannot be put into a "
                "prompt; say in words what to segment, and leave boxes= out"
            )
        found = super().segment(image, query, strategy, answer, prompt, max_new_tokens, is_sentence, draft, mask_size)
        if query is not None:
            found = self.by_query(found, query, answer, is_sentence)
        assert isinstance(found, GroundedSegmentation)
        return found

    def ask(self, queries: list[str], sentences: list[bool], answer: str) -> list[str]:
        """Forced, one conversation with a turn for each query; else a prompt for each."""
        turns = [glamm_prompts.turn(*both, self.template_seed) for both in zip(queries, sentences, strict=True)]
        if answer == "forced":
            (first, given), *later = turns
            return [dialogue([(glamm_prompts.about_image(first, self.mark_image), given), *later])]
        asked = [query if flag else turn[0] for query, flag, turn in zip(queries, sentences, turns, strict=True)]
        return [dialogue([(glamm_prompts.about_image(question, self.mark_image), None)]) for question in asked]

    def question(self, text: str) -> str:
        """The question of a turn, without the words about the picture that come before it."""
        return glamm_prompts.without_overview(text)

    def turns(
        self, query: str | Sequence[str], is_sentence: bool | Sequence[bool] | None = None
    ) -> list[tuple[str, str]]:
        """Question and given answer of each query, as forced conversations have them."""
        queries = [checked_query(text, self.special_tokens()) for text in as_list(query, "query")]
        flags = sentence_flags(queries, is_sentence)
        return [glamm_prompts.turn(*both, self.template_seed) for both in zip(queries, flags, strict=True)]

    def special_tokens(self) -> Sequence[str]:
        """[SEG], the marks of phrases, and the places of regions."""
        return (SEG_TOKEN, PHRASE_START, PHRASE_END, *REGION_TOKENS)

    def by_query(
        self,
        found: Segmentation,
        query: str | Sequence[str],
        answer: str,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> Segmentation:
        """See `Segmenter.by_query`; forced queries are turns of one prompt."""
        if answer != "forced":
            return found
        answers = [given for _, given in self.turns(query, is_sentence)]
        text = answers[0] if isinstance(query, str) else answers
        return replace(found, text=text, query_index=list(range(len(answers))))

    def described(self, found: Segmentation, answered: Answered) -> GroundedSegmentation:
        """Each mask with its phrase."""
        places = zip(answered.rows, answered.places, strict=True)
        return GroundedSegmentation(
            **vars(found), phrases=[self._phrase(answered.said[row], place) for row, place in places]
        )

    def _phrase(self, ids: Sequence[int], place: int) -> str:
        marks = [self.tokenizer.token_id(token) for token in (SEG_TOKEN, PHRASE_START, PHRASE_END)]
        seg, start, end = (-1 if found is None else found for found in marks)
        begin, stop = phrase_span(ids, place, seg, start, end)
        return self.tokenizer.decode(i for i in ids[begin:stop] if i >= 0)
