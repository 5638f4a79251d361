"""A loaded vision-language model with its processor: image and text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, overload

import torch

from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.core.trace import Trace
from tokenprune.engine import PruningRun, model_turn, open_run, prune
from tokenprune.engine.decoder import rotary_parameters
from tokenprune.errors import InputError
from tokenprune.utils.arguments import whole_number
from tokenprune.utils.images import ImageInput
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.common.context_length import check_length
from tokenprune_adapters.hf.conversations import Conversations
from tokenprune_adapters.hf.inputs.prompts import Prompts
from tokenprune_adapters.hf.inputs.rows import rows_of, sizes
from tokenprune_adapters.hf.processor import check_image_tokens, load_processor

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
        row: the answer's batch row in the trace.
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

    def inputs(self, image: ImageInput | Sequence[ImageInput], prompt: str | Sequence[str]) -> Any:
        """The model's inputs on its device, with one batch row for each prompt.

        Args:
            image: one, or several for one prompt: paths, PIL images, arrays or tensors. With a list of prompts, an
                image (or a list of images) for each, or a single image for all.
            prompt: text that is inserted into the chat template, or that contains the model's image placeholder and is
                used unchanged. A list with a single prompt applies to every image. Rows are padded on the left.

        Raises:
            InputError: not an image; an empty prompt; a number of placeholders or prompts that differs from the number
                of images; a prompt with image tokens, which the processor writes itself, or that the chat template
                leaves out; a prompt longer than the model's context.
            UnsupportedError: several prompts, and a tokenizer without a padding token.
        """
        processor = self.processor
        prompts = Prompts(processor, self.model, self.name)
        rows = rows_of(image, prompt)
        texts = [prompts.text(row.prompt, len(row.images)) for row in rows]
        options = {"return_tensors": "pt", **prompts.options(texts)}
        images = [row.images for row in rows]
        # GOT-OCR 2 takes a nested list for the pages of a document
        given: Any = list(chain(*images)) if hasattr(processor, "multi_page") else images
        try:
            with model_turn(self.model):  # fast tokenizers are not thread-safe
                made = processor(text=texts, images=given, **options)
        except Exception as error:  # the exceptions of processors differ between families
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{type(processor).__name__} cannot prepare images of {sizes(chain(*images))} pixels and these "
                f"prompts ({type(error).__name__}: {reason}); resize or crop them, or change the prompts"
            ) from error
        config = self.model.config.get_text_config()
        ids = made["input_ids"]
        check_image_tokens(made, self.model.config, processor, [sizes(some) for some in images], prompts.placeholder)
        # with axes of time, height and width an image has fewer positions than tokens
        if any(len((rope or {}).get("mrope_section") or ()) == 3 for rope in rotary_parameters(config)):
            check_length(config, int((ids != self.model.config.image_token_id).sum(1).max()))
        else:
            check_length(config, ids.shape[1])
        return made.to(self.model.device)

    @overload
    def answer(self, image: Any, prompt: str, strategy: Strategy | None = None, max_new_tokens: int = 64) -> Answer: ...

    @overload
    def answer(
        self, image: Any, prompt: Sequence[str], strategy: Strategy | None = None, max_new_tokens: int = 64
    ) -> list[Answer]: ...

    @torch.inference_mode()
    def answer(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str],
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
    ) -> Answer | list[Answer]:
        """Greedy answer to a prompt about one or several images; for a list of prompts, a list of answers in one batch.

        Decoding is greedy whatever the checkpoint's generation_config.json says; its settings for single tokens (end of
        sequence, suppressed tokens, penalties) apply.

        Args:
            image: the image or images; see `inputs` for images, prompts and errors.
            prompt: a text, or a list of texts, each of which gets the same answer as alone.
            strategy: a `tokenprune.Strategy`; None runs the model unpruned, or pruned by a context that this thread has
                open.
            max_new_tokens: maximum length of an answer.

        Raises:
            IncompatibleError: the strategy requires a read that the model does not provide.
            OptionError: `max_new_tokens` is below 1, or `strategy` is not a strategy.
        """
        limit = whole_number("max_new_tokens", max_new_tokens, 1)
        if strategy is not None:
            checked_strategy(strategy)
        with model_turn(self.model), Conversations(self.model).separated():
            _ = self.processor  # loaded on first use, which must not be measured as preprocessing
            with stage("preprocess"):
                inputs = self.inputs(image, prompt)
            with stage("generation"), self._pruned(strategy) as run:
                ids = self.model.generate(**inputs, max_new_tokens=limit, **self._greedy())
            trace = None if run is None else run.trace
            texts = [self._answer_text(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        answers = [Answer(text, trace, row) for row, text in enumerate(texts)]
        return answers[0] if isinstance(prompt, str) else answers

    def _pruned(self, strategy: Strategy | None) -> AbstractContextManager[PruningRun | None]:
        return nullcontext(open_run(self.model)) if strategy is None else prune(self.model, strategy)

    def _greedy(self) -> dict[str, Any]:
        """Arguments of `generate` that the installed release of transformers has."""
        return {name: value for name, value in GREEDY.items() if hasattr(self.model.generation_config, name)}

    def _answer_text(self, ids: list[int]) -> str:
        ends = self.model.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((place for place, token in enumerate(ids, 1) if token in stops), len(ids))  # padding follows
        return str(self.processor.decode(ids[:end], skip_special_tokens=True))
