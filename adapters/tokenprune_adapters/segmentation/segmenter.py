"""The base of segmentation models: a LLaMA decoder, a vision tower, and a mask head prompted by decoder states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from tokenprune.core.strategy import Strategy
from tokenprune.utils.arguments import whole_number
from tokenprune.utils.images import ImageInput
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.common.context_length import check_length
from tokenprune_adapters.common.tokenizer import TextTokenizer
from tokenprune_adapters.llava.prompt import splice
from tokenprune_adapters.llava.vision import count_layers
from tokenprune_adapters.segmentation.data import Answered, Encoded, Segmentation, SegmenterInputs
from tokenprune_adapters.segmentation.decoder_runs import DecoderRuns
from tokenprune_adapters.segmentation.drafts import Draft, template_of
from tokenprune_adapters.segmentation.image_cache import ImageCache
from tokenprune_adapters.segmentation.image_encoding import ImageEncoding
from tokenprune_adapters.segmentation.many.many_images import ManyImages
from tokenprune_adapters.segmentation.queries import as_list
from tokenprune_adapters.segmentation.sam import masks as sam_masks


class Segmenter(ManyImages, ImageEncoding, DecoderRuns, nn.Module):
    """A loaded model. `segment` runs all steps, `segment_many` runs them for many images; the other methods are single
    steps, which preserve gradients.

    All may be called from any thread; calls that run a tower or the decoder take turns.

    A family overrides prompts that differ from LISA's (`Prompts`), and implements the encoding of images
    (`ImageEncoding`), the part of it that the tower covers (`picture`, `grid_box`), and masks from states
    (`low_res_logits`).

    Args:
        decoder: the language model.
        tower: CLIP, whose patch features become the image tokens.
        projector: from the tower's width to the decoder's.
        mask_projection: from a mask query's final state to a prompt of the mask head.
        select_layer: index of the tower's hidden states that enter the projector.
        tokenizer: the tokenizer.
        mark_image: whether prompts have <im_start> and <im_end> around the image.
        name: name in reports.
        clip_space: shared space of the tower's whole CLIP model, for strategies that compare image and text; None if
            the tower's folder does not contain the whole model.
        tower_layers: of a tower that is no CLIP; None = they are counted.
    """

    def __init__(
        self,
        *,
        decoder: LlamaForCausalLM,
        tower: CLIPVisionModel,
        projector: nn.Module,
        mask_projection: nn.Module,
        select_layer: int,
        tokenizer: TextTokenizer,
        mark_image: bool,
        name: str,
        clip_space: ClipSpace | None = None,
        tower_layers: int | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.tower = tower
        self.tower_layers = count_layers(tower) if tower_layers is None else tower_layers
        self.projector = projector
        self.mask_projection = mask_projection
        self.select_layer = select_layer
        self.tokenizer = tokenizer
        self.mark_image = mark_image
        self.name = name
        self.clip_space = clip_space
        self.image_cache = ImageCache()
        """The images that `segment` encoded last; `image_cache.size = 0` turns it off."""

    def __repr__(self) -> str:
        """The model, its size and device, and the methods to call, without its modules."""
        config, device = self.decoder.config, next(self.decoder.parameters()).device
        return (
            f"{type(self).__name__} {self.name!r}: a decoder of {config.num_hidden_layers} layers on {device}, masks\n"
            "  .segment(image, query, strategy), .segment_many(pairs, strategy), .encode_image(image), .decoder, .tower"
        )

    # implemented by families-----------------------------------------------------------------------------------------

    @abstractmethod
    def low_res_logits_of(self, states: Tensor, images: Sequence[Any], owners: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits of several images, see `low_res_logits`.

        Args:
            states: [n · g, H], of which g consecutive ones form a mask.
            images: encoded images; at least one.
            owners: for each mask, the index of its image.
        """

    def low_res_logits(self, states: Tensor, encoded: Any) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n · g, H], of which g
        consecutive ones form a mask."""
        return self.low_res_logits_of(states, [encoded], [0] * (len(states) // len(self.seg_tokens)))

    @abstractmethod
    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens cover: (top, left, bottom, right) in pixels of the image.

        Args:
            height, width: of the image.
        """

    def to_original_size(self, low_res: Tensor, encoded: Encoded) -> Tensor:
        """Mask logits float32 [n, H, W] at the image's size, from logits over SAM's padded square."""
        return sam_masks.to_original_size(low_res, encoded.prepared.sizes)

    # the steps -------------------------------------------------------------------------------------------------------

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
        mask_size: sam_masks.MaskSize = "image",
    ) -> Segmentation:
        """Masks for one or several queries about one image. The towers run once, and not again for the pictures that
        `image_cache` has.

        Args:
            image: a path, PIL image, numpy array or tensor; or the result of `encode_image`, to reuse it.
            query: a phrase or sentence, stripped and inserted into the family's templates. To compare with published
                results on referring datasets, lowercase it, as their evaluation does.
            strategy: a `tokenprune.Strategy`; None runs the decoder unpruned, or pruned by a context that this thread
                has open.
            answer: "forced" appends an answer with the mask tokens and needs one forward, as the families' evaluation
                does. "generate" lets the model answer, with a mask for each occurrence of the mask tokens.
            prompt: instead of a query, a whole prompt that is used unchanged, with <image> once. If forced, it must
                contain mask tokens, each of which gives a mask; with "generate" the model continues it.
            max_new_tokens: maximum length of a generated answer.
            is_sentence: whether each query is a sentence, for which LISA's datasets use another template than for a
                phrase. By default a query is one if it ends in "." or "?" (ours).
            draft: with "generate", what the model is expected to answer. The first forward checks it, so that an answer
                that comes as expected needs no decoding steps; the text is the same with any draft. True expects what
                the model said to prompts of the same template, False nothing; or an answer, or several, such as
                "Sure, it is [SEG].", of which the most suitable one is tried first.
            mask_size: "image", (height, width) in pixels for another size of the whole image, or "low" for the masks
                as the mask head makes them, over its padded square input, which costs no resizing.

        Raises:
            InputError: not an image; an empty query; neither or both of query and prompt; a prompt without <image> or,
                if forced, without mask tokens; a prompt longer than the model's context.
            OptionError: an unknown `answer`, `draft` or `mask_size`, `max_new_tokens` below 1, or `strategy` is not a
                strategy.
            IncompatibleError: the strategy is incompatible with the model; raised before anything runs.
        """
        whole_number("max_new_tokens", max_new_tokens, 1)
        size = sam_masks.checked_mask_size(mask_size)
        expected = self.expected(draft)
        texts = self.prompts(query, answer, prompt, is_sentence)
        queries = None if query is None else as_list(query, "query")
        with self.pruned(strategy):  # first, so that incompatible strategies are refused before a tower runs
            encoded = self.encoded(image)
            inputs = self.inputs_of(texts, encoded, continues=answer == "generate", queries=queries)
            limit = max_new_tokens if answer == "generate" else None
            answered = self.answer(inputs, max_new_tokens=limit, draft=expected)
            said = self.texts(inputs, answered, answer)
            single = isinstance(prompt if query is None else query, str)
            return self.masks_of(answered, inputs, text=said[0] if single else said, size=size)

    def build_inputs(
        self, image: ImageInput | Any, queries: Sequence[str], *, is_sentence: Sequence[bool] | None = None
    ) -> SegmenterInputs:
        """The decoder's teacher-forced input for queries about one image; see `segment` for arguments and errors."""
        prompts = self.prompts(queries, is_sentence=is_sentence)
        return self.inputs_of(prompts, self.encode_image(image), queries=queries)

    def inputs_of(
        self, prompts: list[str], encoded: Any, continues: bool = False, queries: Sequence[str] | None = None
    ) -> SegmenterInputs:
        """The decoder's input for whole prompts about one image.

        Args:
            prompts: complete texts, with <image> once.
            encoded: the image.
            continues: whether the model continues the prompts.
            queries: the queries, if the prompts were built from them.
        """
        sequence = splice(
            [self.prompt_ids(text) for text in prompts],
            encoded.image_embeddings,
            self.decoder.get_input_embeddings(),
            self.seg_ids,
            continues,
            self.tokenizer.pad_id,
            encoded.image_valid,
        )
        if self.reads_mask_token and not continues:
            sequence = replace(sequence, mask_query=sequence.seg)
        check_length(self.decoder.config, sequence.token_ids.shape[1])
        asked = queries if queries is not None and len(queries) == len(prompts) else [None] * len(prompts)
        templates = [template_of(*both) for both in zip(prompts, asked, strict=True)]
        return SegmenterInputs(prompts, encoded, sequence, self.wordings(prompts, queries), templates)

    def texts(self, inputs: SegmenterInputs, answered: Answered, answer: str) -> list[str]:
        """The answer of each prompt, forced or generated."""
        if answer == "forced":
            return [self.given_answer(text) for text in inputs.prompts]
        return [self.tokenizer.decode(ids) for ids in answered.said]

    def masks_of(
        self,
        answered: Answered,
        inputs: SegmenterInputs,
        text: str | list[str],
        *,
        drawn: tuple[Tensor, Tensor] | None = None,
        size: sam_masks.MaskSize = "image",
        keep_logits: bool = True,
    ) -> Segmentation:
        """Masks from the states of their mask queries.

        Args:
            answered: the states.
            inputs: the prompts, about one image.
            text: the answer.
            drawn: the result of `low_res_logits`, if it is known.
            size: see `sam_masks.masks_at`.
            keep_logits: whether the result has `mask_logits`.
        """
        with stage("mask decoder"):
            low_res, scores = drawn or self.low_res_logits(answered.states, inputs.encoded)
            masks, logits = sam_masks.masks_at(low_res, inputs.encoded.prepared.sizes, size, keep_logits)
        found = Segmentation(
            masks=masks,
            mask_logits=logits,
            low_res_logits=low_res,
            iou_predictions=scores,
            text=text,
            query_index=list(answered.rows),
            trace=answered.trace,
            row_index=list(answered.rows),
            prompt_rows=list(range(len(inputs.prompts))),
        )
        return self.described(found, answered)

    def described(self, found: Segmentation, answered: Answered) -> Segmentation:
        """The result with what a family reads from the answer besides masks; a family may override it."""
        return found

    def by_query(
        self,
        found: Segmentation,
        query: str | Sequence[str],
        answer: str,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> Segmentation:
        """The result with texts and numbers of queries, where prompts are not one for each; a family may override it.

        Arguments as in `segment`.
        """
        return found
