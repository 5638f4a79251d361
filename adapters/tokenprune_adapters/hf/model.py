"""A loaded vision-language model with its processor: image and text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.core.trace import Trace
from tokenprune.engine import PruningRun, model_turn, open_run, prune
from tokenprune.engine.decoder import rotary_parameters
from tokenprune.errors import InputError, OptionError, TokenPruneError, UnsupportedError
from tokenprune.utils.arguments import whole_number
from tokenprune.utils.images import ImageInput
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.common.context_length import check_length
from tokenprune_adapters.hf.conversations import Conversations
from tokenprune_adapters.hf.inputs.prompts import Prompts
from tokenprune_adapters.hf.inputs.rows import rows_of, seen, set_rates
from tokenprune_adapters.hf.inputs.videos import VideoInput, VideoReader
from tokenprune_adapters.hf.processor import asked_of, check_image_tokens, check_images, load_processor, on_device
from tokenprune_adapters.hf.vision_capture import several_of_compressed

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "use_mtp": False,
    "token_healing": False,
    **dict.fromkeys(
        (
            "assistant_early_exit",
            "constraints",
            "dola_layers",
            "force_words_ids",
            "guidance_scale",
            "max_time",
            "penalty_alpha",
            "prefill_chunk_size",
            "prompt_lookup_num_tokens",
            "stop_strings",
        )
    ),
}
"""Arguments of `generate` that override a checkpoint's generation_config: one greedy answer for each prompt, as ids."""


@dataclass(frozen=True, repr=False)
class Answer:
    """An answer of the model.

    Attributes:
        text: the generated text.
        trace: trace of the prefill, if it was pruned by a strategy or a surrounding context; else None. Answers of a
            batch share it.
        row: the answer's batch row in the trace; with beams, the first of its prompt's rows, which are equal.
    """

    text: str
    trace: Trace | None = None
    row: int = 0

    def __repr__(self) -> str:
        """The text and the tokens, without tensors."""
        tokens = "None, nothing was pruned" if self.trace is None else self.trace.summary(self.row)
        return f"Answer:\n  .text: {self.text!r}\n  .trace: row {self.row}: {tokens}"


class VisionLanguageModel:
    """A model of transformers and its processor, as `tokenprune.load` returns them.

    `inputs` and `answer` may be called from any thread; calls take turns.

    Args:
        model: the model with its language-modelling head; `tokenprune.prune` accepts it or this object.
        source: folder or hub id of the processor, which is loaded on first use.
        name: name in reports.
        revision: revision of a hub id.
    """

    def __init__(self, model: Any, source: str, name: str, revision: str | None = None) -> None:
        self.model, self.source, self.name, self.revision = model, source, name, revision

    def __repr__(self) -> str:
        """The model, its device, and the methods to call."""
        return (
            f"{type(self).__name__} {self.name!r}: {type(self.model).__name__} on {self.model.device}\n"
            "  .answer(image, prompt, strategy), .inputs(image, prompt), .model, .processor"
        )

    @property
    def base_model(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.base_model

    @cached_property
    def processor(self) -> Any:
        """The model's processor; without torchvision it does not support videos.

        Raises:
            CheckpointError: the folder contains none, or it requires a package that is not installed.
        """
        return load_processor(self.source, self.model.config, self.revision)

    def inputs(
        self,
        image: ImageInput | Sequence[ImageInput] | None,
        prompt: str | Sequence[str],
        *,
        video: VideoInput | Sequence[VideoInput] | None = None,
        frames: int | None = None,
        fps: float | None = None,
    ) -> Any:
        """The model's inputs on its device, with one batch row for each prompt.

        Args:
            image: one, or several for one prompt: paths, PIL images, arrays or tensors. With a list of prompts, an
                image (or a list of images) for each, or a single image for all. None beside a video.
            prompt: text that is inserted into the chat template, behind the images and videos, or that contains the
                model's placeholders for them and is used unchanged. A list with a single prompt applies to every image
                or video. Rows are padded on the left.
            video: one, or several for one prompt: the path of a video file, or of a folder with its frames; a list of
                frames; an array or tensor [frames, height, width, 3]. With a list of prompts, a video, a list of
                videos or None for each, or a single video for all.
            frames: number of frames, at even distances, that the model sees of a video.
            fps: frames per second that the model sees: a file is sampled at this rate, and frames that are given have
                it. Without `frames` and `fps`, files are sampled as the video processor does by itself, and frames
                that are given are all used, at the processor's rate.

        Raises:
            InputError: not an image or a video; an empty prompt; a number of placeholders or prompts that differs from
                the number of images or videos; a prompt with image tokens, which the processor writes itself, or that
                the chat template leaves out; a prompt longer than the model's context.
            OptionError: `frames` or `fps` is not a positive number, both are given, or there is no video.
            UnsupportedError: several prompts, and a tokenizer without a padding token; a video, and a family without
                videos, or a processor without torchvision.
        """
        processor = self.processor
        prompts = Prompts(processor, self.model, self.name)
        if video is None and not (frames is None and fps is None):
            raise OptionError("frames= and fps= are about a video; pass video=, or leave them out")
        reader = None if video is None else VideoReader(prompts.video_processor(), frames, fps)
        rows = rows_of(image, prompt, video, reader)
        prompts.check_kinds(any(row.images for row in rows), any(row.videos for row in rows))
        texts = [prompts.text(row.prompt, len(row.images), len(row.videos)) for row in rows]
        options = {"return_tensors": "pt", **prompts.options(texts), **asked_of(processor), **seen(processor, rows)}
        try:
            with model_turn(self.model):  # fast tokenizers are not thread-safe
                made = processor(text=texts, **options)
        except Exception as error:  # the exceptions of processors differ between families
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{type(processor).__name__} cannot prepare images of {', '.join(row.sizes for row in rows)} pixels "
                f"and these prompts ({type(error).__name__}: {reason}); resize or crop them, or change the prompts"
                f"{'' if reader is None else ', or the number of frames (frames=)'}"
            ) from error
        set_rates(made, processor, rows)
        visual = prompts.visual(made["input_ids"], reader is not None)
        sizes = [row.sizes for row in rows]
        check_image_tokens(made, visual, self.model.config, processor, sizes, prompts.placeholder)
        check_images(made, self.model.config, sizes)
        config = self.model.config.get_text_config()
        # with axes of time, height and width an image has fewer positions than tokens
        if any(len((rope or {}).get("mrope_section") or ()) == 3 for rope in rotary_parameters(config)):
            text = ~visual & made.get("attention_mask", ~visual).bool()  # without padding
            check_length(config, int(text.sum(1).max()))
        else:
            check_length(config, visual.shape[1])
        return on_device(made, self.model)

    @overload
    def answer(
        self,
        image: Any,
        prompt: str,
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
        *,
        num_beams: int = 1,
        video: Any = None,
        frames: int | None = None,
        fps: float | None = None,
    ) -> Answer: ...

    @overload
    def answer(
        self,
        image: Any,
        prompt: Sequence[str],
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
        *,
        num_beams: int = 1,
        video: Any = None,
        frames: int | None = None,
        fps: float | None = None,
    ) -> list[Answer]: ...

    @torch.inference_mode()
    def answer(
        self,
        image: ImageInput | Sequence[ImageInput] | None,
        prompt: str | Sequence[str],
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
        *,
        num_beams: int = 1,
        video: VideoInput | Sequence[VideoInput] | None = None,
        frames: int | None = None,
        fps: float | None = None,
    ) -> Answer | list[Answer]:
        """Answer to a prompt about images or videos; for a list of prompts, a list of answers in one batch.

        Decoding is greedy, or by beam search with `num_beams`, whatever the checkpoint's generation_config.json says;
        its settings for single tokens (end of sequence, suppressed tokens, penalties) and for beams (length penalty,
        early stopping) apply.

        Args:
            image: the image or images; see `inputs` for images, prompts, videos and errors.
            prompt: a text, or a list of texts, each of which gets the same answer as alone.
            strategy: a `tokenprune.Strategy`; None runs the model unpruned, or pruned by a context that this thread has
                open.
            max_new_tokens: maximum length of an answer.
            num_beams: number of beams; 1 is greedy decoding.
            video: the video or videos.
            frames: number of frames of a video.
            fps: frames per second of a video.

        Raises:
            IncompatibleError: the strategy requires a read that the model does not provide.
            OptionError: `max_new_tokens` or `num_beams` is below 1, or `strategy` is not a strategy.
            UnsupportedError: transformers has no beam search for this model.
        """
        search = {
            "max_new_tokens": whole_number("max_new_tokens", max_new_tokens, 1),
            "num_beams": whole_number("num_beams", num_beams, 1),
        }
        if strategy is not None:
            checked_strategy(strategy)
        with model_turn(self.model), Conversations(self.model).separated():
            _ = self.processor  # loaded on first use, which must not be measured as preprocessing
            with stage("preprocess"):
                inputs = self.inputs(image, prompt, video=video, frames=frames, fps=fps)
            with stage("generation"), self._pruned(strategy) as run:
                ids = self._generated(inputs, **search)
            trace = None if run is None else run.trace
            texts = [self._answer_text(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        # in the prefill a prompt has as many rows as beams, which are equal
        answers = [Answer(text, trace, row * search["num_beams"]) for row, text in enumerate(texts)]
        return answers[0] if isinstance(prompt, str) else answers

    def _pruned(self, strategy: Strategy | None) -> AbstractContextManager[PruningRun | None]:
        return nullcontext(open_run(self.model)) if strategy is None else prune(self.model, strategy)

    def _generated(self, inputs: Any, num_beams: int, max_new_tokens: int) -> Tensor:
        """Ids of one sequence for each prompt."""
        kept = inputs.get("video_compression_mask")
        if num_beams > 1 and kept is not None and not kept.all():
            raise UnsupportedError(several_of_compressed(self.name))
        options = {**self._greedy(), "num_beams": num_beams, "max_new_tokens": max_new_tokens}
        try:
            ids: Tensor = self.model.generate(**inputs, **options)
        except ValueError as error:
            if num_beams == 1 or isinstance(error, TokenPruneError):
                raise
            reason = " ".join(str(error).split())[:200]  # Llama 4 does not repeat its images for the beams
            raise UnsupportedError(
                f"{self.name}: transformers has no beam search for these inputs of the model ({reason}); use "
                "num_beams=1"
            ) from error
        return ids

    def _greedy(self) -> dict[str, Any]:
        """Arguments of `generate` that the installed release of transformers has."""
        return {name: value for name, value in GREEDY.items() if hasattr(self.model.generation_config, name)}

    def _answer_text(self, ids: list[int]) -> str:
        ends = self.model.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((place for place, token in enumerate(ids, 1) if token in stops), len(ids))  # padding follows
        return str(self.processor.decode(ids[:end], skip_special_tokens=True))
