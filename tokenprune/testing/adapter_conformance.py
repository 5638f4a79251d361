"""The conformance kit for adapters: tests what tokenprune guarantees for any model on an adapter's family.

from tokenprune.testing.adapter_conformance import AdapterConformance

class TestMyFamily(AdapterConformance):
    adapter = "my-family"

    def model(self):
        return tiny_model()  # of the family's own class, with random weights

    def inputs(self, rows):
        return processed([PROMPTS[row] for row in rows])  # keyword arguments of the model's call
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import Read
from tokenprune.core.strategy import Strategy
from tokenprune.engine import BoundModel, prune
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.checked_model import CheckedBoundModel
from tokenprune.engine.interface.compatibility import compatible
from tokenprune.errors import BudgetError
from tokenprune.evaluation.contenders import contenders
from tokenprune.plugins import registry
from tokenprune.testing.kit.grid_checks import check_cells
from tokenprune.testing.kit.model_snapshot import differences, snapshot
from tokenprune.testing.kit.recording import Break, Breaking
from tokenprune.testing.oracle import masked
from tokenprune.testing.scripted import Asking, Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

Inputs = dict[str, Any]


class AdapterConformance:
    """Subclass it and define `adapter`, `model` and `inputs`; pytest does the rest.

    Attributes:
        adapter: registered name.
        prompts: how many prompts `inputs` has: two or more, with images, of different lengths.
        schedules: number of random schedules for the comparison of engine and oracle.
        tolerance: largest absolute and relative difference of outputs by rounding.
        in_reading_order: whether an image's tokens are in the prompt row by row, from left to right.
    """

    adapter: ClassVar[str] = ""
    prompts: ClassVar[int] = 2
    schedules: ClassVar[int] = 8
    tolerance: ClassVar[float] = 1e-4
    in_reading_order: ClassVar[bool] = True

    # for authors ----------------------------------------------------------------------------------------------------

    def model(self) -> Any:
        """A tiny model of the family in eval mode, on the CPU, in float32, with weights large enough to matter."""
        raise pytest.UsageError(f"{type(self).__name__}: give model(), which makes a tiny model of the family")

    def inputs(self, rows: Sequence[int]) -> Inputs:
        """The keyword arguments of the model's call for these prompts as one batch, padded to the longest on the left.

        Args:
            rows: numbers below `prompts`; the same number means the same prompt and the same images in every batch.
        """
        raise pytest.UsageError(f"{type(self).__name__}: give inputs(rows), the arguments of the model's call")

    def text(self) -> Inputs | None:
        """The same for a prompt without images; None if the family always needs one."""
        return None

    def sizes(self, row: int) -> Sequence[tuple[int, int]] | None:
        """Rows and columns of cells of each image of a prompt, which an adapter may mix up; None = not compared."""
        return None

    def output(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """[batch, sequence, …] of one call of the model; its logits by default."""
        logits: Tensor = model(**inputs).logits
        return logits

    def longer(self, inputs: Inputs, new: Tensor) -> Inputs:
        """The inputs with the text tokens `new`, int64 [batch, n], behind them; by default ids and attention mask grow,
        and every other tensor of their shape by zeros."""
        shape, zeros = inputs["input_ids"].shape, torch.zeros_like(new)
        tails = {"input_ids": new, "attention_mask": torch.ones_like(new)}
        return {
            name: torch.cat((value, tails.get(name, zeros).to(value.dtype)), 1)
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for name, value in inputs.items()
        }

    # invariants ------------------------------------------------------------------------------------------------------

    def test_it_knows_its_models_and_no_others(self) -> None:
        """The adapter is registered, binds the model before any other does, and leaves a plain LLaMA alone."""
        entries = registry.adapters()
        binders = [name for name, entry in entries.items() if entry.call(self._model, method="bind")]
        assert self.adapter in binders, f"bind() of {self.adapter!r} does not know {type(self._model).__name__}"
        assert binders[0] == self.adapter, f"{binders[0]!r} is asked before {self.adapter!r}, and knows the model too"
        for other in (tiny_llama(), "no model at all", None):
            known = entries[self.adapter].call(other, method="bind")
            assert known is None, f"bind({type(other).__name__}) is to be None"
        known = entries[self.adapter].call("folder", {"model_type": "no-such-type"}, method="matches")
        assert not known, "matches() accepts an unknown model_type"

    def test_image_tokens_and_cells_fit_together(self) -> None:
        """Every prompt has image tokens, numbered by image, in cells row by row, in a batch as alone."""
        layout = self._layout(self._all)
        for row, count in enumerate(layout.counts.tolist()):
            prompt = f"prompt {row}"
            assert count > 0, f"{prompt}: no image token is marked"
            numbers, cells = (values[row, :count].tolist() for values in _marked(layout))
            check_cells(prompt, numbers, cells, self.sizes(row), self.in_reading_order)
            alone = self._layout(self.inputs([row]))
            for what, here, there in (
                ("tokens that are not padding", int(layout.valid[row].sum()), int(alone.valid.sum())),
                ("image numbers", numbers, _marked(alone)[0][0].tolist()),
                ("cells", cells, _marked(alone)[1][0].tolist()),
            ):
                assert here == there, f"{prompt}: {what} in the batch {here}, alone {there}"

    def test_keep_all_is_the_untouched_model(self) -> None:
        """If every token is kept, outputs equal those of the untouched model, to the bit."""
        expected = self._untouched(self._all)
        found = self._pruned(self._all, self._keeping())
        assert torch.equal(found, expected), f"off by {float((found - expected).abs().max()):.2g}; see prompt_masks()"

    def test_nothing_stays_on_the_model(self) -> None:
        """After a run, and after an exception in one, the model is unchanged."""
        expected, before = self._untouched(self._all), snapshot(self._model)
        self._pruned(self._all, self._script(self._layout(self._all), 0))
        self._same(before, "a run")
        with pytest.raises(Break):
            self._pruned(self._all, Breaking(self._keeping(), number=0))
        self._same(before, "an exception in a run")
        assert torch.equal(self._untouched(self._all), expected), "afterwards the untouched model answers differently"

    def test_engine_equals_masked_oracle(self) -> None:
        """Random schedules give the same as the full sequence with masks."""
        self._skip_without_oracle()
        layout, untouched = self._layout(self._all), self._untouched(self._all)
        seen = False
        for seed in range(self.schedules):
            script = self._script(layout, seed)
            found = self._pruned(self._all, script)
            with masked(self._decoder, layout, script):
                expected = self._untouched(self._all)
            what = f"schedule {seed}: the engine and the masked oracle"
            self._near(found[layout.valid], expected[layout.valid], what)
            seen |= bool((found - untouched)[layout.valid].abs().max() > self.tolerance)
        assert seen, "dropped tokens change nothing; give the tiny model larger weights, as initializer_range=0.2"

    def test_batch_row_equals_row_alone(self) -> None:
        """A prompt has the same outputs in a padded batch as alone."""
        layout = self._layout(self._all)
        for seed in range(3):
            script = self._script(layout, seed)
            together = self._pruned(self._all, script)
            for row in range(self.prompts):
                found = self._pruned(self.inputs([row]), script.row(row, int(layout.counts[row])))
                what = f"schedule {seed}, prompt {row}: the answers in the batch and alone"
                self._near(together[row : row + 1, -found.shape[1] :], found, what)

    def test_cached_decoding_equals_recomputation(self) -> None:
        """Tokens decoded on the pruned cache equal those of the whole longer sequence."""
        if not callable(getattr(self._model, "generate", None)):
            pytest.skip("the model has no generate()")
        self._skip_without_oracle()
        inputs, start = self._all, self._all["input_ids"].shape[1]
        layout = self._layout(inputs)
        script = self._script(layout, 1)
        options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        never = {*(self._model.generation_config.suppress_tokens or ())}
        never |= {*inputs["input_ids"][layout.image_tokens].tolist()}  # an answer in random words may hold any token
        options |= {"max_new_tokens": 3, "min_new_tokens": 3, "suppress_tokens": sorted(never)}
        with torch.no_grad(), prune(self._model, script, strict=True):
            made = self._model.generate(**inputs, **options)
        longer = self.longer(inputs, made.sequences[:, -3:])  # from embeddings, generate() gives the new ones alone
        grown = SequenceLayout.from_mask(
            torch.nn.functional.pad(layout.image_tokens, (0, 3)), longer.get("attention_mask")
        )
        with masked(self._decoder, grown, script):
            expected = self._untouched(longer)
        for step, logits in enumerate(made.logits):
            what = f"new token {step}: cached decoding and recomputation"
            self._near(logits[:, None], expected[:, start - 1 + step, None], what)

    def test_prompts_without_images_run(self) -> None:
        """A text-only prompt has the same outputs as without pruning, also after one with images."""
        text = self.text()
        if text is None:
            pytest.skip("text() gives no prompt without images")
        expected = self._untouched(text)
        with torch.no_grad(), prune(self._model, self._keeping(), strict=True):
            self.output(self._model, self._all)
            assert torch.equal(self.output(self._model, text), expected)

    def test_vision_side_answers_for_each_token(self) -> None:
        """Every kind of read that is offered has a value, which for a prompt in a batch is the same as alone."""
        kinds = sorted(self._binding.offers(), key=lambda kind: kind.__name__)
        if not kinds:
            pytest.skip("nothing of the vision side is offered")
        counts = self._layout(self._all).counts.tolist()
        for kind in kinds:
            together = self._asked(self._all, kind)
            for row, count in enumerate(counts):
                single = self._asked(self.inputs([row]), kind)
                if kind.axis is None or not isinstance(together, Tensor):
                    continue
                here, there = together[row, :count], single[0, :count]
                if not here.is_floating_point():  # numbers that say what belongs together
                    here, there = here[:, None] == here, there[:, None] == there
                assert here.isfinite().all(), f"{kind.__name__}, prompt {row}: not finite"
                what = f"{kind.__name__}, prompt {row}: the answer in the batch and the one alone"
                self._near(here[None].float(), there[None].float(), what)

    def test_every_strategy_runs_or_says_why(self) -> None:
        """Every installed strategy that is compatible runs at budget 0.5; the others are refused before the run."""
        ran, valid = [], self._layout(self._all).valid
        for name in registry.strategies():
            if not compatible(name, self._model):
                continue
            try:
                found = self._pruned(self._all, contenders([name], 0.5)[0].strategy)
            except BudgetError:
                continue  # so few layers and tokens cannot meet it
            assert found.isfinite()[valid].all(), f"{name}: outputs that are not finite"
            ran.append(name)
        assert ran, "no strategy runs on this model"

    # ------------------------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _ready(self) -> None:
        self.prepare()

    def prepare(self) -> None:
        """What pytest does before each test: make the model, and call it once, since transformers puts hooks of its own
        on some models then."""
        self._model = self.model()
        self._all = self.inputs(range(self.prompts))
        self._untouched(self._all)
        entry = registry.get("adapters", self.adapter)
        binding = entry.call(self._model, method="bind")
        assert isinstance(binding, BoundModel), f"bind() of {self.adapter!r} answers {binding!r}, expected a BoundModel"
        binding = CheckedBoundModel(binding, entry)
        stack = find_decoder(binding.decoder)
        self._binding, self._decoder, self._depth = binding, stack.module, len(stack.layers)
        self._keeps_states = stack.keeps_states

    def _skip_without_oracle(self) -> None:
        if self._keeps_states:
            pytest.skip("some decoder layers keep a state, from which no mask hides a token")

    @torch.no_grad()
    def _untouched(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.output(self._model, inputs)

    @torch.no_grad()
    def _pruned(self, inputs: Mapping[str, Any], strategy: Strategy) -> Tensor:
        with prune(self._model, strategy, strict=True):
            return self.output(self._model, inputs)

    @torch.no_grad()
    def _layout(self, inputs: Mapping[str, Any]) -> SequenceLayout:
        with prune(self._model, Scripted([]), strict=True) as run:
            self.output(self._model, inputs)
        return run.trace.layout

    def _keeping(self) -> Scripted:
        """Keeps every token, at every layer."""
        exists = self._layout(self._all).slots >= 0
        return Scripted([Step(layer, Keep.where(exists)) for layer in range(self._depth)])

    def _script(self, layout: SequenceLayout, seed: int) -> Scripted:
        config: Any = self._decoder.config
        return random_script(layout.slots >= 0, self._depth, config.hidden_size, seed)

    def _asked(self, inputs: Mapping[str, Any], kind: type[Read]) -> Any:
        asking = Asking(kind())
        self._pruned(inputs, asking)
        return asking.answer

    def _near(self, found: Tensor, expected: Tensor, what: str) -> None:
        if found.shape != expected.shape:
            pytest.fail(f"{what} differ in shape: {[*found.shape]}, {[*expected.shape]}", pytrace=False)
        if not torch.allclose(found, expected, rtol=self.tolerance, atol=self.tolerance):
            gap = float((found - expected).abs().nan_to_num(nan=float("inf")).max())
            pytest.fail(f"{what} differ by {gap:.2g}", pytrace=False)

    def _same(self, before: dict[str, Any], after: str) -> None:
        left = differences(before, snapshot(self._model))
        assert not left, f"after {after} the model is not as it was: {'; '.join(left[:5])}"


def _marked(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Image numbers [batch, N] and cells [batch, N, 2] of the image tokens."""
    return layout.gather_slots(layout.image_number), layout.gather_slots(layout.grid)
