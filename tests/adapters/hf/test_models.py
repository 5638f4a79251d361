"""Transformers' own vision-language models, whose image tokens `prune` finds by itself; nothing is left on them."""

from __future__ import annotations

import pytest
import torch
from vlm_configs import IMAGE, TEXT
from vlm_families import FAMILIES, READABLE
from vlm_known import CASES, PADDED_RUNS, RUNS, expected_cells, is_packed, model_of
from vlm_watching import Half, Reader, blocks_of, inputs_of, projector_of, read, separators

import tokenprune
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Stage
from tokenprune.errors import InputError, PluginError

names = pytest.mark.parametrize("name", READABLE)
runs = pytest.mark.parametrize(("name", "case"), RUNS)
padded_runs = pytest.mark.parametrize(("name", "case", "padding"), PADDED_RUNS)


def text_of(inputs):
    """The same prompts with text in place of every placeholder, and nothing about images."""
    ids = inputs["input_ids"]
    ids = torch.where(ids >= IMAGE, TEXT.start, ids)
    kinds = {key: torch.zeros_like(ids) for key in inputs if key.endswith("token_type_ids")}
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"], **kinds}


# where the image tokens are ------------------------------------------------------------------------------------------


@padded_runs
def test_image_tokens_pictures_and_cells(name, case, padding):
    inputs = inputs_of(name, case, padding)
    separator = separators(name, model_of(name), inputs)
    marked = is_packed(name, inputs) or name == "hunyuan_vl" or (name, case) == ("video_llava", "videos")
    assert separator.any() == marked
    seen, trace = read(model_of(name), Reader(), inputs)
    layout = trace.layout
    assert torch.equal(layout.image_tokens, FAMILIES[name].image_tokens(inputs) & ~separator)
    assert torch.equal(layout.valid, inputs["attention_mask"].bool())
    for row, cells in enumerate(expected_cells(name, inputs, separator)):
        found = torch.cat((seen["image"][row, :, None], seen["grid"][row]), 1)
        assert found[: len(cells)].tolist() == [list(cell) for cell in cells]
        assert not seen["exists"][row, len(cells) :].any()
    assert (layout.image_number >= 0).eq(layout.image_tokens).all()
    assert (layout.grid >= 0).all(-1).eq(layout.image_tokens).all()


@runs
def test_forward_and_generate_prune_alike(name, case):
    model, inputs = model_of(name), inputs_of(name, case)
    _, forward = read(model, Half(), inputs)
    _, generated = read(model, Half(), inputs, lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
    assert [stage.kept for stage in forward.stages] == [stage.kept for stage in generated.stages]
    assert forward.ledger.entries == generated.ledger.entries
    assert torch.equal(forward.layout.image_tokens, generated.layout.image_tokens)


@names
def test_marking_image_tokens_by_hand_prunes_alike(name):
    model, inputs = model_of(name), inputs_of(name)
    layout = read(model, Reader(), inputs)[1].layout

    class Own(Half):
        def stages(self, shape):
            return [Stage("attention", 2, reads=AttentionFrom("last"))]

    with torch.no_grad():
        with tokenprune.prune(model, Own()) as found:
            ours = model(**inputs).logits
        with tokenprune.prune(model, Own(), image_tokens=layout.image_tokens) as marked:
            theirs = model(**inputs).logits
    assert torch.equal(ours, theirs)
    assert found.trace.stages[0].kept == marked.trace.stages[0].kept


@names
def test_the_model_without_its_head_is_accepted_and_called_either_way(name):
    model, inputs = model_of(name), inputs_of(name)
    _, full = read(model, Half(), inputs)
    for opened, called in ((model.model, model), (model, model.model), (model.model, model.model)):
        _, trace = read(opened, Half(), inputs, lambda called=called: called(**inputs))
        assert [stage.kept for stage in trace.stages] == [stage.kept for stage in full.stages]


@names
def test_prompts_follow_each_other_in_one_context(name):
    """Images, text alone, other images, the first ones again: each prefill knows only its own."""
    model, strategy, first, second = model_of(name), Half(), inputs_of(name), inputs_of(name, "several images")
    alone = [[stage.kept for stage in read(model, Half(), inputs)[1].stages] for inputs in (first, second)]
    text = text_of(first)
    with torch.no_grad():
        untouched = model(**text).logits
        with tokenprune.prune(model, strategy) as run:
            for inputs, expected in ((first, alone[0]), (text, None), (second, alone[1]), (first, alone[0])):
                logits = model(**inputs).logits
                if expected is None:
                    assert torch.equal(logits, untouched)
                    assert not run.trace.stages
                    assert not run.trace.layout.image_tokens.any()
                else:
                    assert [stage.kept for stage in run.trace.stages] == expected
            model.generate(**first, max_new_tokens=2)
            model.generate(**text, max_new_tokens=2)
            assert not run.trace.layout.image_tokens.any()


@names
def test_a_row_of_text_beside_a_row_with_an_image(name):
    """The row with the image is pruned as it is alone."""
    size = CASES["two sizes"][0]
    alone, beside = FAMILIES[name].inputs([size]), FAMILIES[name].inputs([size, size])
    ids = beside["input_ids"][1]
    placeholders = FAMILIES[name].image_tokens(beside)[1]
    ids[placeholders] = TEXT.start
    kinds = {key: alone[key].new_zeros(ids.shape) for key in alone if key.endswith("token_type_ids")}
    rows = {key: torch.stack((beside[key][0], value)) for key, value in kinds.items()}
    padding = {key: beside[key] for key in ("input_ids", "attention_mask")}
    _, expected = read(model_of(name), Half(), alone)
    _, trace = read(model_of(name), Half(), {**alone, **padding, **rows})
    assert trace.layout.counts.tolist() == [*expected.layout.counts.tolist(), 0]
    assert [stage.kept for stage in trace.stages] == [[*stage.kept, []] for stage in expected.stages]


# what is left behind -------------------------------------------------------------------------------------------------


def state_of(model):
    """Everything that a context may touch: instance attributes, hooks, configurations."""
    return [
        (sorted(vars(one)), len(one._forward_hooks), len(one._forward_pre_hooks), id(vars(one).get("config")))
        for one in model.modules()
    ]


def explode(*args):
    raise ZeroDivisionError("on purpose")


class Failing(Half):
    """Raises in its second stage."""

    def choose(self, stage, tokens):
        return explode() if stage.name == "attention" else super().choose(stage, tokens)


@names
def test_nothing_is_left_on_the_model(name):
    model, inputs = FAMILIES[name].build(), inputs_of(name)
    layers = FAMILIES[name].decoder(model).layers
    with torch.no_grad():
        untouched = model(**inputs).logits  # transformers puts hooks of its own on towers at the first call
        before = state_of(model)
        _, trace = read(model, Half(), inputs)
        assert len(trace.stages) == 2
        assert state_of(model) == before
        for module in (blocks_of(model)[1], projector_of(model), layers[0], layers[3]):
            handle = module.register_forward_hook(explode)
            with pytest.raises(ZeroDivisionError):
                read(model, Half(), inputs)
            handle.remove()
            assert state_of(model) == before
        with pytest.raises(PluginError, match="on purpose"):
            read(model, Failing(), inputs)
        assert state_of(model) == before
        assert torch.equal(model(**inputs).logits, untouched)


@names
def test_a_failed_prefill_leaves_nothing_for_the_next_one(name):
    """Placeholders without pixels are refused, although images were encoded just before."""
    model, inputs = model_of(name), inputs_of(name)
    with torch.no_grad(), tokenprune.prune(model, Half()) as run:
        handle = FAMILIES[name].decoder(model).layers[3].register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        pixels = [key for key in inputs if key.startswith(("pixel", "image"))]
        with pytest.raises(InputError, match="no image was encoded"):
            model(**{key: value for key, value in inputs.items() if key not in pixels})
        model(**inputs)
        assert len(run.trace.stages) == 2
