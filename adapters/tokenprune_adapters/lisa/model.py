"""LISA on transformers' own classes: from an image and queries to masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, SamModel

from tokenprune.base import Strategy
from tokenprune.engine import PruningRun, prune
from tokenprune.errors import InputError, OptionError
from tokenprune.trace import Trace
from tokenprune_adapters import sam_masks
from tokenprune_adapters.clip import ClipPixels
from tokenprune_adapters.generation import Generated, generate
from tokenprune_adapters.images import ImageInput, to_rgb
from tokenprune_adapters.lisa import prompts as lisa_prompts
from tokenprune_adapters.lisa.prompts import FORCED_ANSWER, SEG_TOKEN
from tokenprune_adapters.lisa.results import EncodedImage, LisaInputs, PreparedImage, Segmentation
from tokenprune_adapters.llava_prompt import prompt_ids, splice
from tokenprune_adapters.llava_vision import run_tower, vision_source
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
        strategy: Strategy | None = None,
        answer: Literal["forced", "generate"] = "forced",
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 64,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> Segmentation:
        """Masks for one query, or several, about one image. The towers run once.

        Args:
            image: a path, PIL image, numpy array or tensor; or what `encode_image` gave, to spare the towers another
                run.
            query: a phrase or sentence; the words go into LISA's templates, white space around them is dropped. For
                figures comparable with those of referring data sets, lowercase it, as their evaluation does.
            strategy: a `tokenprune.Strategy`; None leaves the decoder untouched.
            answer: "forced" gives the answer "[SEG]." and takes one pass, as LISA's evaluation does. "generate" lets
                the model answer; it makes a mask for each [SEG] that it says.
            prompt: instead of a query, a whole prompt that is taken as it is, with <image> once. Forced, it must hold
                its [SEG]s, and each makes a mask; with "generate" the model goes on from its end.
            max_new_tokens: limit of a generated answer.
            is_sentence: whether each query is a sentence, which LISA's data sets ask in another template than a
                phrase. By default a query is one if it ends in "." or "?" (ours).

        Raises:
            InputError: something that is no image, an empty query, neither or both of query and prompt, a prompt
                without <image> or, forced, without [SEG].
            OptionError: an unknown `answer`, or no new tokens allowed.
        """
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens={max_new_tokens} found, expected at least 1")
        texts = self.prompts(query, answer, prompt, is_sentence)
        inputs = self.inputs_of(texts, self.encode_image(image), continues=answer == "generate")
        if answer == "forced":
            states, trace = self.run_decoder(inputs, strategy)
            rows, columns = inputs.sequence.seg.nonzero(as_tuple=True)
            picked = states[rows, columns - 1]
            owners = rows.tolist()
            said = [_given_answer(text) for text in texts]
        else:
            generated, trace = self.run_generation(inputs, strategy, max_new_tokens)
            owners, steps = generated.where(self.seg_id)
            picked = generated.states[owners, steps]
            said = [self.tokenizer.decode(ids) for ids in generated.ids]
        low_res, scores = self.low_res_logits(picked, inputs.encoded)
        logits = sam_masks.to_original_size(low_res, inputs.encoded.prepared.sizes)
        single = isinstance(prompt if query is None else query, str)
        return Segmentation(
            masks=logits > 0,
            mask_logits=logits,
            low_res_logits=low_res,
            iou_predictions=scores,
            text=said[0] if single else said,
            query_index=owners,
            trace=trace,
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
                if not isinstance(text, str):
                    raise InputError(f"prompt is a {type(text).__name__}, expected a string")
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
        config: Any = self.sam.config.vision_config
        pixels, sizes = sam_masks.preprocess(rgb, config.image_size)
        return PreparedImage(self.clip_pixels(rgb), pixels, sizes)

    def encode_image(self, image: ImageInput | PreparedImage | EncodedImage) -> EncodedImage:
        """Tower features, image tokens and SAM's image embedding. What is encoded already is returned as it is.

        Raises:
            InputError: not an image.
        """
        if isinstance(image, EncodedImage):
            return image
        prepared = image if isinstance(image, PreparedImage) else self.prepare_image(image)
        tower = run_tower(self.tower, prepared.clip_pixels, self.select_layer)
        sam_embedding = sam_masks.embed_image(self.sam, prepared.sam_pixels.to(tower.features))
        return EncodedImage(prepared, tower, self.projector(tower.features), sam_embedding)

    def build_inputs(
        self, image: ImageInput | EncodedImage, queries: Sequence[str], *, is_sentence: Sequence[bool] | None = None
    ) -> LisaInputs:
        """The decoder's teacher-forced input for queries about one image; see `segment` for arguments and errors."""
        return self.inputs_of(self.prompts(queries, is_sentence=is_sentence), self.encode_image(image))

    def inputs_of(self, prompts: list[str], encoded: EncodedImage, continues: bool = False) -> LisaInputs:
        """The decoder's input for whole prompts about one image.

        Args:
            prompts: complete texts, with <image> once.
            encoded: the image.
            continues: the model is to go on from the end of the prompts.
        """
        ids = [prompt_ids(self.tokenizer, text) for text in prompts]
        embed_tokens = self.decoder.get_input_embeddings()
        sequence = splice(ids, encoded.image_embeddings, embed_tokens, [self.seg_id], continues, self.tokenizer.pad_id)
        return LisaInputs(prompts, encoded, sequence)

    def run_decoder(self, inputs: LisaInputs, strategy: Strategy | None = None) -> tuple[Tensor, Trace | None]:
        """One prefill without a cache: final-norm states [queries, S, H], and what the strategy did."""
        with self.pruned(inputs, strategy) as run:
            states: Tensor = self.decoder.model(
                inputs_embeds=inputs.sequence.inputs_embeds,
                attention_mask=inputs.sequence.attention_mask,
                use_cache=False,
            ).last_hidden_state.to(inputs.sequence.inputs_embeds.device)
        return states, None if run is None else run.trace

    def run_generation(
        self, inputs: LisaInputs, strategy: Strategy | None = None, max_new_tokens: int = 64
    ) -> tuple[Generated, Trace | None]:
        """Greedy answers to prompts that continue, and what the strategy did in their prefill."""
        with self.pruned(inputs, strategy) as run:
            generated = generate(self.decoder, inputs.sequence, max_new_tokens, self._end_ids())
        return generated, None if run is None else run.trace

    @contextmanager
    def pruned(self, inputs: LisaInputs, strategy: Strategy | None) -> Iterator[PruningRun | None]:
        """The context in which the decoder runs under a strategy; gives the run, or None without a strategy."""
        if strategy is None:
            yield None
            return
        sequence, encoded = inputs.sequence, inputs.encoded
        queries = {"mask_query": sequence.mask_query}
        if sequence.seg.any(1).all():
            queries["seg"] = sequence.seg
        source = vision_source(
            encoded.tower,
            self.projector,
            lambda: self.clip_pixels.picture(encoded.prepared.clip_pixels),
            rows=len(inputs.prompts),
        )
        with prune(self.decoder, strategy, image_tokens=sequence.image_tokens, queries=queries, vision=source) as run:
            yield run

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens show: (top, left, bottom, right) in its own pixels.

        Args:
            height, width: of the image.
        """
        return self.clip_pixels.box(height, width)

    def low_res_logits(self, states: Tensor, encoded: EncodedImage) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n, H]."""
        home = encoded.sam_embedding.device
        return sam_masks.low_res_logits(self.sam, encoded.sam_embedding, self.mask_projection(states.to(home)))

    def _end_ids(self) -> set[int]:
        ends = self.decoder.config.eos_token_id
        if ends is None:
            return {self.tokenizer.eos_id}
        return {ends} if isinstance(ends, int) else set(ends)


def _several(value: Any, what: str) -> list[str]:
    if not isinstance(value, (str, Sequence)):
        raise InputError(f"{what} is a {type(value).__name__}, expected a string or a list of strings")
    texts = [value] if isinstance(value, str) else list(value)
    if not texts:
        raise InputError(f"{what} is an empty list, expected at least one string")
    return texts


def _given_answer(prompt: str) -> str:
    if "ASSISTANT:" not in prompt:
        return FORCED_ANSWER
    return prompt.rsplit("ASSISTANT:", 1)[1].removesuffix("</s>").strip()
