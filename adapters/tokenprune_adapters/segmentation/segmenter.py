"""The base of segmentation models made of LLaMA, a vision tower, and a mask head that the decoder's states prompt."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from tokenprune.core.strategy import Strategy
from tokenprune.engine import model_turn
from tokenprune.utils.arguments import whole_number
from tokenprune.utils.images import ImageInput
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.common.context_length import check_length
from tokenprune_adapters.common.tokenizer import LlamaSlowTokenizer
from tokenprune_adapters.llava.prompt import prompt_ids, splice
from tokenprune_adapters.llava.vision import count_layers
from tokenprune_adapters.segmentation import sam_masks
from tokenprune_adapters.segmentation.data import Answered, Encoded, Segmentation, SegmenterInputs
from tokenprune_adapters.segmentation.decoder_runs import DecoderRuns
from tokenprune_adapters.segmentation.queries import as_list, given_answer

_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_turn(method: _Method) -> _Method:
    """A model's method that runs in a turn of its thread, see `tokenprune.engine.model_turn`."""

    @functools.wraps(method)
    def safe(self: Segmenter, *args: Any, **kwargs: Any) -> Any:
        with model_turn(self.decoder.model):
            return method(self, *args, **kwargs)

    return safe  # type: ignore[return-value]


class Segmenter(DecoderRuns, nn.Module):
    """A loaded model. `segment` does everything; the other methods are its steps, and let gradients through.

    Both may be called from any thread; calls that run a tower or the decoder take turns.

    A family says what its prompts are where they are not LISA's (`Prompts`), how an image is encoded (`encode_image`),
    what of it the tower shows (`picture`, `grid_box`), and how states become masks (`low_res_logits`).

    Args:
        decoder: the language model.
        tower: CLIP, whose patch features become the image tokens.
        projector: from the tower's width to the decoder's.
        mask_projection: from a mask query's final state to what prompts the mask head.
        select_layer: index of the tower's hidden states that the projector reads.
        tokenizer: text to ids.
        mark_image: whether prompts have <im_start> and <im_end> around the image.
        name: shown in reports.
        clip_space: of the tower's whole CLIP model, for strategies that compare image and text; None where the tower's
            folder holds less.
    """

    def __init__(
        self,
        *,
        decoder: LlamaForCausalLM,
        tower: CLIPVisionModel,
        projector: nn.Module,
        mask_projection: nn.Module,
        select_layer: int,
        tokenizer: LlamaSlowTokenizer,
        mark_image: bool,
        name: str,
        clip_space: ClipSpace | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.tower = tower
        self.tower_layers = count_layers(tower)
        self.projector = projector
        self.mask_projection = mask_projection
        self.select_layer = select_layer
        self.tokenizer = tokenizer
        self.mark_image = mark_image
        self.name = name
        self.clip_space = clip_space

    def __repr__(self) -> str:
        """What it is, and what to call, without its modules."""
        config, device = self.decoder.config, next(self.decoder.parameters()).device
        return (
            f"{type(self).__name__} {self.name!r}: a decoder of {config.num_hidden_layers} layers on {device}, masks\n"
            "  .segment(image, query, strategy), .encode_image(image), .decoder, .tower"
        )

    # what a family says ----------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_image(self, image: Any) -> Any:
        """Everything that depends on the image alone; what is encoded already is returned as it is. The result has
        what `segmentation.Encoded` says.

        Raises:
            InputError: not an image.
        """

    @abstractmethod
    def low_res_logits(self, states: Tensor, encoded: Any) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n · g, H], the g of a mask
        in a row."""

    @abstractmethod
    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens show: (top, left, bottom, right) in its own pixels.

        Args:
            height, width: of the image.
        """

    def to_original_size(self, low_res: Tensor, encoded: Encoded) -> Tensor:
        """Mask logits float32 [n, H, W] at the image's size, of those over SAM's padded square."""
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
    ) -> Segmentation:
        """Masks for one query, or several, about one image. The towers run once.

        Args:
            image: a path, PIL image, numpy array or tensor; or what `encode_image` gave, to spare the towers another
                run.
            query: a phrase or sentence; the words go into the family's templates, white space around them is dropped.
                For figures comparable with those of referring datasets, lowercase it, as their evaluation does.
            strategy: a `tokenprune.Strategy`; None leaves the decoder as it is: untouched, or pruned by a context that
                this thread has open.
            answer: "forced" gives an answer that holds the mask tokens and takes one pass, as the families' evaluation
                does. "generate" lets the model answer; it makes a mask each time that the model says them.
            prompt: instead of a query, a whole prompt that is taken as it is, with <image> once. Forced, it must hold
                its mask tokens, and each makes a mask; with "generate" the model goes on from its end.
            max_new_tokens: limit of a generated answer.
            is_sentence: whether each query is a sentence, which LISA's datasets ask in another template than a
                phrase. By default a query is one if it ends in "." or "?" (ours).

        Raises:
            InputError: something that is no image, an empty query, neither or both of query and prompt, a prompt
                without <image> or, forced, without mask tokens; a prompt longer than the model's context.
            OptionError: an unknown `answer`, no new tokens allowed, or no strategy.
            IncompatibleError: the strategy is incompatible with the model; raised before anything runs.
        """
        whole_number("max_new_tokens", max_new_tokens, 1)
        texts = self.prompts(query, answer, prompt, is_sentence)
        queries = None if query is None else as_list(query, "query")
        with self.pruned(strategy):  # opened first: what is incompatible is refused before a tower runs
            encoded = self.encode_image(image)
            inputs = self.inputs_of(texts, encoded, continues=answer == "generate", queries=queries)
            answered = self.answer(inputs, max_new_tokens=max_new_tokens if answer == "generate" else None)
            said = self.texts(inputs, answered, answer)
            single = isinstance(prompt if query is None else query, str)
            return self.masks_of(answered, inputs, text=said[0] if single else said)

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
            continues: the model is to go on from the end of the prompts.
            queries: what the user asked, where the prompts were made of it.
        """
        sequence = splice(
            [prompt_ids(self.tokenizer, text) for text in prompts],
            encoded.image_embeddings,
            self.decoder.get_input_embeddings(),
            self.seg_ids,
            continues,
            self.tokenizer.pad_id,
            encoded.image_valid,
        )
        check_length(self.decoder.config, sequence.token_ids.shape[1])
        return SegmenterInputs(prompts, encoded, sequence, self.wordings(prompts, queries))

    def texts(self, inputs: SegmenterInputs, answered: Answered, answer: str) -> list[str]:
        """The answer of each prompt, given or generated."""
        if answer == "forced":
            return [given_answer(text, self.forced_answer) for text in inputs.prompts]
        return [self.tokenizer.decode(ids) for ids in answered.said]

    def masks_of(self, answered: Answered, inputs: SegmenterInputs, text: str | list[str]) -> Segmentation:
        """Masks from the states that were picked for them."""
        with stage("mask decoder"):
            low_res, scores = self.low_res_logits(answered.states, inputs.encoded)
            logits = self.to_original_size(low_res, inputs.encoded)
            masks = logits > 0
        return Segmentation(
            masks=masks,
            mask_logits=logits,
            low_res_logits=low_res,
            iou_predictions=scores,
            text=text,
            query_index=list(answered.rows),
            trace=answered.trace,
            row_index=list(answered.rows),
        )
