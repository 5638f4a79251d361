"""What `print` shows of results: a few lines that name what there is, and no tensors."""

from __future__ import annotations

import torch

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.trace import Trace
from tokenprune.engine import prune
from tokenprune.testing.scripted import Scripted, Step
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune_adapters.glamm.results import GroundedSegmentation
from tokenprune_adapters.segmentation.data import Segmentation


def traced(rows: int) -> Trace:
    """Two of the four image tokens in layers 2 and 3 of 4, in every row."""
    image = torch.zeros(rows, 6, dtype=torch.bool)
    image[:, 1:5] = True
    kept = torch.tensor([[True, False, True, False]]).expand(rows, -1)
    script = Scripted([Step(2, Keep.where(kept, rest="park"))])
    model = tiny_llama(4).model
    with torch.no_grad(), prune(model, script, image_tokens=image) as run:
        model(inputs_embeds=torch.randn(rows, 6, 32, generator=torch.Generator().manual_seed(0)))
    return run.trace


def result(masks: int, trace: Trace | None) -> Segmentation:
    shown = torch.zeros(masks, 10, 20, dtype=torch.bool)
    shown[:, :5, :10] = True  # a quarter
    text = "It is [SEG]." if masks == 1 else [f"Number {number}" for number in range(masks)]
    rows = list(range(masks))
    return Segmentation(shown, shown.float(), torch.zeros(masks, 4, 4), torch.zeros(masks), text, rows, trace, rows)


TOKENS = "4 image tokens, 2 from layer 2; 3.0 equivalent tokens (75.0%)"


def test_a_run_tells_of_itself_and_its_latest_prefill() -> None:
    image = torch.zeros(1, 6, dtype=torch.bool)
    image[:, 1:5] = True
    model = tiny_llama(4).model
    with torch.no_grad(), prune(model, tp.strategy("uniform", keep=2), image_tokens=image) as run:
        first = f"PruningRun: {run.strategy!r} on LlamaModel of 4 layers\n"
        assert repr(run) == first + "  .trace: none yet; call the model"
        model(input_ids=torch.arange(6)[None])
        assert repr(run) == first + f"  .trace: {run.trace!r}"


def test_a_ledger_is_one_line() -> None:
    assert repr(traced(1).ledger) == ("Ledger(4 image tokens, 2 others; 4 layers, 3.0 equivalent tokens (75.0%))")
    assert repr(traced(3).ledger).startswith("Ledger(3 rows, 4 image tokens, 2 others; 4 layers")


def test_one_mask() -> None:
    assert str(result(1, traced(1))).splitlines() == [
        "Segmentation:",
        "  .masks: bool [1, 10, 20], covering 25.0% of the image; .mask_logits as large, .low_res_logits [1, 4, 4]",
        "  .text: 'It is [SEG].'",
        f"  .trace: row 0: {TOKENS}",
    ]
    assert ".trace: None, nothing was pruned" in repr(result(1, None))


def test_many_masks_stay_a_few_lines() -> None:
    lines = str(result(50, traced(50))).splitlines()
    assert "[50, 10, 20], covering 25.0%, 25.0%, 25.0%, … of the image" in lines[1]
    assert lines[2] == "  .text: ['Number 0', 'Number 1', 'Number 2', …]"
    assert lines[-1] == "  .trace: …"
    assert len(lines) == 7
    assert max(map(len, lines)) <= 160


def test_no_mask_and_a_long_text() -> None:
    found = Segmentation(*[torch.zeros(0, 3, 3)] * 3, torch.zeros(0), "word " * 1000, [])
    assert ".masks: bool [0, 3, 3]; " in str(found)
    assert len(str(found)) < 300


def test_phrases_are_shown() -> None:
    found = GroundedSegmentation(**vars(result(2, None)), phrases=["a dog", "a cat"])
    assert str(found).startswith("GroundedSegmentation:")
    assert ".phrases: ['a dog', 'a cat']" in str(found)


def test_traces_and_stages() -> None:
    trace = traced(1)
    assert str(trace) == f"Trace({trace.strategy}: {TOKENS})"
    assert str(trace.stages) == "[StageTrace('0' at layer 2, park: 2 active, 2 parked, 0 dropped; [1, 4])]"
    lines = str(traced(6)).splitlines()
    assert lines[1:] == [*(f"  row {row}: {TOKENS}" for row in range(4)), "  …)"]


def test_rows_of_different_lengths() -> None:
    image = torch.zeros(2, 8, dtype=torch.bool)
    image[0, 1:7], image[1, 1:5] = True, True
    model = tiny_llama(4).model
    with torch.no_grad(), prune(model, tp.strategy("fastv", layer=1, keep=0.5), image_tokens=image) as run:
        model(inputs_embeds=torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)))
    first, second = (run.trace.summary(row) for row in range(2))
    assert first == "6 image tokens, 3 from layer 1; 3.8 equivalent tokens (62.5%)"
    assert second == "4 image tokens, 2 from layer 1; 2.5 equivalent tokens (62.5%)"
    assert "3–2" not in str(run.trace.stages[0])
    assert "2–3 active, 0 parked, 2–3 dropped" in str(run.trace.stages[0])
