"""LISA on transformers' own classes: from an image and queries to masks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, SamModel

from tokenprune.errors import InputError, OptionError
from tokenprune_adapters import sam_masks
from tokenprune_adapters.clip import ClipPixels, patch_features
from tokenprune_adapters.generation import generate
from tokenprune_adapters.images import ImageInput, to_rgb
from tokenprune_adapters.lisa import prompts as lisa_prompts
from tokenprune_adapters.lisa.prompts import FORCED_ANSWER, SEG_TOKEN
from tokenprune_adapters.lisa.results import EncodedImage, PreparedImage, Segmentation
from tokenprune_adapters.llava_prompt import DecoderInputs, prompt_ids, splice
from tokenprune_adapters.tokenizer import LlamaSlowTokenizer


class LisaModel(nn.Module):
    """A loaded LISA. `segment` does everything; the other methods are its steps, and let gradients through.

    Args:
        decoder: the language model.
        tower: CLIP, whose patch features become the image tokens.
        projector: from the tower's width to the decoder's.
        sam: its encoder sees the image a second time, its mask decoder draws the masks.
        mask_projection: from a mask query's final state to the prompt embedding of SAM's mask decoder.
        tokenizer: text to ids.
        clip_pixels: the tower's image processor.
        select_layer: index of the tower's hidden states that the projector reads.
        mark_image: whether prompts have <im_start> and <im_end> around the image.
        name: shown in reports.
    """

    def __init__(
        self,
        *,
        decoder: LlamaForCausalLM,
        tower: CLIPVisionModel,
        projector: nn.Linear,
        sam: SamModel,
        mask_projection: nn.Sequential,
        tokenizer: LlamaSlowTokenizer,
        clip_pixels: ClipPixels,
        select_layer: int,
        mark_image: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.tower = tower
        self.projector = projector
        self.sam = sam
        self.mask_projection = mask_projection
        self.tokenizer = tokenizer
        self.clip_pixels = clip_pixels
        self.select_layer = select_layer
        self.mark_image = mark_image
        self.name = name
        seg_id = tokenizer.token_id(SEG_TOKEN)
        assert seg_id is not None  # the loader refuses a tokenizer without it
        self.seg_id: int = seg_id

    @torch.inference_mode()
    def segment(
        self,
        image: ImageInput | EncodedImage,
        query: str | Sequence[str] | None = None,
        strategy: Any = None,
        answer: Literal["forced", "generate"] = "forced",
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 64,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> Segmentation:
        """Masks for one query, or several, about one image. The towers run once.

        Args:
            image: a path, PIL image, numpy array or tensor; or what `encode_image` gave, to spare the towers another run.
            query: a phrase or sentence; the words go into LISA's templates, white space around them is dropped. For figures
                comparable with those of referring data sets, lowercase it, as their evaluation does.
            strategy: a `tokenprune.Strategy`; None leaves the decoder untouched.
            answer: "forced" gives the answer "[SEG]." and takes one pass, as LISA's evaluation does. "generate" lets the model
                answer; it makes a mask for each [SEG] that it says.
            prompt: instead of a query, a whole prompt that is taken as it is, with <image> once. Forced, it must hold its
                [SEG]s, and each makes a mask; with "generate" the model goes on from its end.
            max_new_tokens: limit of a generated answer.
            is_sentence: whether each query is a sentence, which LISA's data sets ask in another template than a phrase. By
                default a query is one if it ends in "." or "?" (ours).

        Raises:
            InputError: something that is no image, an empty query, neither or both of query and prompt, a prompt without
                <image> or, forced, without [SEG].
            OptionError: an unknown `answer`.
        """
        texts = self.prompts(query, answer, prompt, is_sentence)
        encoded = image if isinstance(image, EncodedImage) else self.encode_image(self.prepare_image(image))
        inputs = self.build_inputs(texts, encoded, padding="left" if answer == "generate" else "right")
        with self.pruned(strategy, inputs, encoded) as run:
            if answer == "forced":
                states = self.final_states(inputs)
                rows, columns = inputs.seg.nonzero(as_tuple=True)
                picked = states[rows, columns - 1]
                owners = rows.tolist()
                said = [_given_answer(text) for text in texts]
            else:
                generated = generate(self.decoder, inputs, max_new_tokens, self._end_ids())
                found = [
                    (row, step)
                    for row, ids in enumerate(generated.ids)
                    for step, i in enumerate(ids)
                    if i == self.seg_id
                ]
                owners = [row for row, _ in found]
                picked = generated.states[owners, [step for _, step in found]]
                said = [self.tokenizer.decode(ids) for ids in generated.ids]
        low_res, scores = self.low_res_logits(picked, encoded)
        logits = sam_masks.to_original_size(low_res, encoded.prepared.sizes)
        single = isinstance(prompt if query is None else query, str)
        return Segmentation(
            masks=logits > 0,
            mask_logits=logits,
            low_res_logits=low_res,
            iou_predictions=scores,
            text=said[0] if single else said,
            query_index=owners,
            trace=None if run is None else run.trace,
        )

    def prompts(
        self,
        query: str | Sequence[str] | None,
        answer: str = "forced",
        prompt: str | Sequence[str] | None = None,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> list[str]:
        """The whole prompts for queries, or the given ones once checked; arguments and errors as in `segment`."""
        if answer not in ("forced", "generate"):
            raise OptionError(f"answer={answer!r} found, expected 'forced' or 'generate'")
        if (query is None) == (prompt is None):
            raise InputError(
                f"{'neither' if query is None else 'both'} of query and prompt given, expected one of them"
            )
        if prompt is not None:
            texts = _several(prompt, "prompt")
            for text in texts:
                prompt_ids(self.tokenizer, text)
                if answer == "forced" and SEG_TOKEN not in text:
                    raise InputError(
                        f"the prompt holds no {SEG_TOKEN}; put one where a mask is wanted, or use answer='generate'"
                    )
            return texts
        queries = [lisa_prompts.checked_query(text) for text in _several(query, "query")]
        if is_sentence is None:
            sentences = [lisa_prompts.is_sentence(text) for text in queries]
        else:
            sentences = [is_sentence] * len(queries) if isinstance(is_sentence, bool) else list(is_sentence)
        if len(sentences) != len(queries):
            raise InputError(f"is_sentence has {len(sentences)} values for {len(queries)} queries; give one for each")
        template = lisa_prompts.forced_prompt if answer == "forced" else lisa_prompts.open_prompt
        return [template(text, flag, self.mark_image) for text, flag in zip(queries, sentences, strict=True)]

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Pixels for both towers.

        Raises:
            InputError: not an image.
        """
        rgb = to_rgb(image)
        pixels, sizes = sam_masks.preprocess(rgb, self.sam.config.vision_config.image_size)
        return PreparedImage(self.clip_pixels(rgb), pixels, sizes)

    def encode_image(self, prepared: PreparedImage) -> EncodedImage:
        """Tower features, image tokens and SAM's image embedding."""
        features = patch_features(self.tower, prepared.clip_pixels, self.select_layer)
        sam_pixels = prepared.sam_pixels.to(features)
        return EncodedImage(prepared, features, self.projector(features), sam_masks.embed_image(self.sam, sam_pixels))

    def build_inputs(
        self, prompts: Sequence[str], encoded: EncodedImage, padding: Literal["right", "left"] = "right"
    ) -> DecoderInputs:
        """The decoder's input for several whole prompts about one image."""
        return splice(
            [prompt_ids(self.tokenizer, text) for text in prompts],
            encoded.image_embeddings,
            self.decoder.get_input_embeddings(),
            [self.seg_id],
            padding,
            self.tokenizer.pad_id,
        )

    def final_states(self, inputs: DecoderInputs) -> Tensor:
        """Final-norm states [B, S, H] of one pass without a cache."""
        states: Tensor = self.decoder.model(
            inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask, use_cache=False
        ).last_hidden_state
        return states

    def low_res_logits(self, states: Tensor, encoded: EncodedImage) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n, H]."""
        home = encoded.sam_embedding.device
        return sam_masks.low_res_logits(self.sam, encoded.sam_embedding, self.mask_projection(states.to(home)))

    def pruned(self, strategy: Any, inputs: DecoderInputs, encoded: EncodedImage) -> AbstractContextManager[Any]:
        """The context in which the decoder runs under a strategy; gives the run, or None without a strategy."""
        if strategy is None:
            return nullcontext()
        raise NotImplementedError

    def _end_ids(self) -> set[int]:
        ends = self.decoder.config.eos_token_id
        if ends is None:
            return {self.tokenizer.eos_id}
        return {ends} if isinstance(ends, int) else set(ends)


def _several(value: Any, what: str) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value)
    if not texts:
        raise InputError(f"an empty list of {what}s was given, expected at least one")
    return texts


def _given_answer(prompt: str) -> str:
    if "ASSISTANT:" not in prompt:
        return FORCED_ANSWER
    return prompt.rsplit("ASSISTANT:", 1)[1].removesuffix("</s>").strip()
