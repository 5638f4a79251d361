"""The decoder side of a segmentation model: from its input to the states for the masks, pruned or not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from tokenprune.core.reads import Read
from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.engine import (
    BoundModel,
    PromptMasks,
    PruningRun,
    VisionCapture,
    VisionSource,
    model_turn,
    open_run,
    prune,
    shared_prefill,
)
from tokenprune.errors import InputError
from tokenprune.utils.arguments import instance, whole_number
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.llava.draft import with_drafts
from tokenprune_adapters.llava.prompt import DecoderInputs
from tokenprune_adapters.llava.vision import offers, vision_source
from tokenprune_adapters.segmentation.capture import SegmenterCapture, decoding
from tokenprune_adapters.segmentation.data import Answered, Encoded, SegmenterInputs
from tokenprune_adapters.segmentation.drafts import AnswerDrafts, Draft, answer_ids, given_drafts
from tokenprune_adapters.segmentation.generation import Generated, generate
from tokenprune_adapters.segmentation.prompts import Prompts


class DecoderRuns(Prompts, BoundModel):
    """The methods of a segmentation model that run its decoder, and its implementation of `BoundModel`."""

    name: str
    decoder: LlamaForCausalLM
    tower: CLIPVisionModel
    projector: nn.Module
    clip_space: ClipSpace | None

    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads that `vision_source` provides for any image."""
        return offers(self.clip_space)

    @abstractmethod
    def picture(self, encoded: Any) -> Tensor:
        """The part of an image that the image tokens cover, see `tokenprune.core.reads.Pixels`."""

    # runs -------------------------------------------------------------------------------------------------------------

    def run_decoder(self, inputs: SegmenterInputs, strategy: Strategy | None = None) -> tuple[Tensor, Trace | None]:
        """One prefill without a cache: final-norm states [rows, S, H], and the trace.

        Args:
            inputs: from `build_inputs`.
            strategy: as in `segment`.

        Raises:
            InputError: `inputs` is of the wrong type.
            OptionError: `strategy` is not a strategy.
        """
        instance("inputs", inputs, SegmenterInputs, "the result of build_inputs(image, queries)", InputError)
        with self.pruned(strategy) as run, decoding(self, inputs), self._sharing(inputs.sequence), stage("prefill"):
            states: Tensor = self.decoder.model(
                inputs_embeds=inputs.sequence.inputs_embeds,
                attention_mask=inputs.sequence.attention_mask,
                position_ids=inputs.sequence.positions,
                use_cache=False,
            ).last_hidden_state.to(inputs.sequence.inputs_embeds.device)
        return states, None if run is None else run.trace

    def run_generation(
        self,
        inputs: SegmenterInputs,
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
        draft: Draft | AnswerDrafts = True,
    ) -> tuple[Generated, Trace | None]:
        """Greedy answers to prompts that the model continues, and the trace of their prefill.

        Args:
            inputs: the prompts.
            strategy, max_new_tokens, draft: as in `segment`.
        """
        instance("inputs", inputs, SegmenterInputs, "the result of inputs_of(…, continues=True)", InputError)
        whole_number("max_new_tokens", max_new_tokens, 1)
        memory = self.expected(draft)
        with self.pruned(strategy) as run, stage("generation"):
            templates = inputs.templates or [None] * len(inputs.prompts)

            def expect(row: int, said: Sequence[int]) -> list[int]:
                return memory.expect(templates[row], said)

            first = [expect(row, ())[: max_new_tokens - 1] for row in range(len(inputs.prompts))]
            sequence = with_drafts(inputs.sequence, first, self.decoder.get_input_embeddings())
            with decoding(self, replace(inputs, sequence=sequence)), self._sharing(sequence):
                generated = generate(self.decoder, sequence, max_new_tokens, self.end_ids(), expect, self.ends)
            for template, ids in zip(templates, generated.ids, strict=True):
                self.drafts.learn(template, ids)
        return generated, None if run is None else run.trace

    @cached_property
    def drafts(self) -> AnswerDrafts:
        """The answers that the model is expected to give; it learns from those that it gives."""
        return AnswerDrafts(answer_ids(self.usual_answers, self.tokenizer))

    def expected(self, draft: Draft | AnswerDrafts) -> AnswerDrafts:
        """What the model is expected to answer, by the `draft` of `segment`, which raises the errors of it."""
        if isinstance(draft, AnswerDrafts):
            return draft
        if isinstance(draft, bool):
            return self.drafts if draft else AnswerDrafts()
        return AnswerDrafts(given_drafts(draft, self.tokenizer))

    def answer(
        self,
        inputs: SegmenterInputs,
        strategy: Strategy | None = None,
        max_new_tokens: int | None = None,
        draft: Draft | AnswerDrafts = True,
    ) -> Answered:
        """The states for the masks: those before forced mask tokens, or those that predicted generated ones; with
        `reads_mask_token` those of the tokens themselves, which the last token of a generated answer does not have.

        Args:
            inputs: the prompts.
            strategy: as in `segment`.
            max_new_tokens: maximum length of a generated answer; None = the answers are in the prompts.
            draft: as in `segment`.
        """
        if max_new_tokens is None:
            states, trace = self.run_decoder(inputs, strategy)
            said, before = inputs.sequence.token_ids.tolist(), 1  # a token is predicted by the state before it
        else:
            generated, trace = self.run_generation(inputs, strategy, max_new_tokens, draft)
            states, said, before = generated.states, generated.ids, 0  # those that predicted each token
        before -= int(self.reads_mask_token)
        group = len(self.seg_tokens)
        found = [
            (row, place)
            for row, tokens in enumerate(said)
            for place in self.mask_places(tokens)
            if place + group - 1 - before < len(tokens)
        ]
        rows = [row for row, _ in found for _ in range(group)]
        columns = [place + step - before for _, place in found for step in range(group)]
        return Answered(states[rows, columns], [row for row, _ in found], [place for _, place in found], said, trace)

    @contextmanager
    def pruned(self, strategy: Strategy | None) -> Iterator[PruningRun | None]:
        """A turn in which the decoder runs under a strategy. Yields the run; without a strategy that of a surrounding
        context, or None."""
        with model_turn(self.decoder.model), ExitStack() as stack:
            if strategy is not None:
                with stage("pruning context"):
                    stack.enter_context(prune(self, strategy))
            yield open_run(self.decoder.model)

    def _sharing(self, sequence: DecoderInputs) -> AbstractContextManager[None]:
        """What the prompts have in common is computed once, if the decoder is not pruned; the engine does it else."""
        if open_run(self.decoder.model) is not None or not sequence.shared or len(sequence.token_ids) == 1:
            return nullcontext()
        return shared_prefill(self.decoder.model, sequence.shared, sequence.attention_mask.bool())

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
        """See `tokenprune.engine.BoundModel.capture`. Nothing is intercepted, since the model runs its own decoder."""
        yield SegmenterCapture(self)

    def prompt_masks(self, inputs: SegmenterInputs) -> PromptMasks:
        """Image tokens and query rows of a decoder input."""
        sequence = inputs.sequence
        queries = {"mask_query": sequence.mask_query}
        if sequence.seg.any(1).all():
            queries["seg"] = sequence.seg
        cells = self.image_cells(inputs)
        return PromptMasks(sequence.image_tokens, queries, *cells, drafted=sequence.drafted, shared=sequence.shared)

    def image_cells(self, inputs: SegmenterInputs) -> tuple[Tensor | None, Tensor | None]:
        """`grid` and `image_number` of `PromptMasks`; None = one square image per batch row, in row-major order."""
        return None, None

    def vision_source(
        self, encoded: Encoded, rows: int, texts: Mapping[str, Sequence[Sequence[str]]] | None = None
    ) -> VisionSource:
        """All reads of an encoded image, for `rows` batch rows: the tower, the projector, the image and, if available,
        CLIP's space. `texts` as in `llava.vision.vision_source`."""
        return vision_source(encoded.tower, self.projector, lambda: self.picture(encoded), rows, self.clip_space, texts)

    def ends(self, said: Sequence[int]) -> bool:
        """Whether an answer, ids so far, has ended, besides with one of `end_ids`; a family may override it."""
        return False

    def end_ids(self) -> set[int]:
        """Ids that end an answer."""
        ends = self.decoder.config.eos_token_id
        if ends is None:
            return {self.tokenizer.eos_id}
        return {ends} if isinstance(ends, int) else set(ends)
