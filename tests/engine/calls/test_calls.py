"""The ways in which a decoder is called: states and attentions asked for, packed prompts, hooks of others, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import LAYERS, WIDTH, random_layout
from torch.nn.modules import module as modules

from tokenprune.core.decisions import Keep
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.testing.oracle import masked
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

IDS = torch.arange(1, 25).reshape(2, 12)  # without 0, which generate() takes for padding
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:8] = True
HALF = Keep.where(torch.tensor([[True, False, True, False, True, False]] * 2))
ALL = Keep.where(torch.ones(2, 6, dtype=torch.bool))


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture
def model():
    return tiny_llama(LAYERS)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["none", "left", "right"]), st.booleans())
def test_hidden_states_equal_the_oracles_whatever_was_called_before(seed, padding, before):
    """transformers puts its hooks on when states are first asked for, so before or behind the engine."""
    model = tiny_llama(LAYERS)
    layout, ids = random_layout(seed, 2, padding)
    embeds = torch.randn(*layout.valid.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed)
    inputs = {"inputs_embeds": embeds, "attention_mask": layout.valid.long(), "position_ids": ids, "use_cache": False}
    with torch.no_grad():
        with masked(model.model, layout, script):
            expected = [embeds]
            hooks = [  # behind the oracle's own
                layer.register_forward_hook(lambda module, args, output: expected.append(_first(output)))
                for layer in model.model.layers
            ]
            expected[LAYERS:] = [model.model(**inputs).last_hidden_state]
            for hook in hooks:
                hook.remove()
        if before:
            model.model(**inputs, output_hidden_states=True)
        with prune(model, script, image_tokens=layout.image_tokens):
            plain = model.model(**inputs).last_hidden_state
            got = model.model(**inputs, output_hidden_states=True)
    assert len(got.hidden_states) == LAYERS + 1
    assert torch.equal(got.hidden_states[0], embeds)  # what came in, before any stage
    for mine, oracles in zip(got.hidden_states[1:], expected[1:], strict=True):
        assert mine.shape == oracles.shape
        assert (mine - oracles)[layout.valid].abs().max() < 2e-5
    assert (got.last_hidden_state - plain)[layout.valid].abs().max() < 1e-6


def test_a_keep_all_schedule_gives_the_untouched_models_states_and_attentions():
    model = tiny_llama(LAYERS, attention="eager")
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    with torch.no_grad():
        expected = model(IDS, **asked)
        with prune(model, Scripted([Step(0, ALL), Step(1, ALL)]), image_tokens=IMAGE):
            got = model(IDS, **asked)
    for name in ("hidden_states", "attentions"):
        for mine, untouched in zip(got[name], expected[name], strict=True):
            assert torch.equal(mine, untouched)


@pytest.mark.parametrize("configured", [False, True])
def test_attentions_of_pruned_layers_are_refused(configured):
    model = tiny_llama(LAYERS, attention="eager")
    model.config.output_attentions = configured
    asked = {} if configured else {"output_attentions": True}
    with torch.no_grad(), prune(model, Scripted([Step(1, HALF)]), image_tokens=IMAGE):
        with pytest.raises(UnsupportedError, match="output_attentions=True is not supported"):
            model(IDS, **asked)
        cache = model(IDS, use_cache=True, output_attentions=False).past_key_values
        with pytest.raises(UnsupportedError, match="output_attentions=True is not supported"):
            model(IDS[:, :1], past_key_values=cache, **asked)


def test_hooks_of_others_see_full_length_states_and_may_change_them(model):
    seen = []

    def double(module, args, output):
        seen.append(output.shape[1])
        return output * 2

    layer = model.model.layers[2]
    script = Scripted([Step(1, HALF)])
    layout = None
    with torch.no_grad():
        with prune(model, script, image_tokens=IMAGE) as run:
            hook = layer.register_forward_hook(double)
            got = model.model(IDS).last_hidden_state
            hook.remove()
            layout = run.trace.layout
        reference = copy.deepcopy(model)
        with masked(reference.model, layout, script):
            reference.model.layers[2].register_forward_hook(double)
            expected = reference.model(IDS, use_cache=False).last_hidden_state
    assert seen == [12, 12]
    present = layout.valid & ~layout.image_tokens
    assert (got - expected)[present].abs().max() < 2e-5


KINDS = ["forward", "forward_pre", "every module's forward", "every module's forward_pre"]


def look(kind, layers, note):
    """Put hooks on the layers or on all modules that call `note(number, value)` with what enters, or comes out of, a
    layer, and use what it answers. Returns their handles."""
    numbers = {layer: number for number, layer in enumerate(layers)}

    def behind(module, args, output):
        return note(numbers[module], output) if module in numbers else None

    def before(module, args):
        return (note(numbers[module], args[0]), *args[1:]) if module in numbers else None

    hook = before if kind.endswith("_pre") else behind
    if kind.startswith("every"):
        return [getattr(modules, f"register_module_{kind.split()[-1]}_hook")(hook)]
    return [getattr(layer, f"register_{kind}_hook")(hook) for layer in layers]


@pytest.mark.parametrize("stage", range(LAYERS))
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_any_kind_see_and_change_what_the_oracles_do(model, kind, stage):
    """Before the stage, at it and behind it; what comes in at a layer is what came out of the one before."""
    script = Scripted([Step(stage, HALF)])
    with torch.no_grad():
        with prune(model, script, image_tokens=IMAGE) as run:
            model(IDS)
        layout = run.trace.layout

        def outcome(context, kind):
            seen = []

            def note(number, value):
                seen.append((number, value))
                return value * 1.5 if number == 1 else value

            with context:
                handles = look(kind, model.model.layers, note)
                try:
                    return seen, model.model(IDS, use_cache=False).last_hidden_state
                finally:
                    for handle in handles:
                        handle.remove()

        # the oracle's hooks are those of the layers: those of all modules would come before them
        expected, output = outcome(masked(model.model, layout, script), kind.split()[-1])
        got, mine = outcome(prune(model, script, image_tokens=IMAGE), kind)
    assert [number for number, _ in got] == list(range(LAYERS))
    present = layout.valid & ~layout.image_tokens  # the oracle takes no change of what was dropped
    for (_, one), (_, other) in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other)[present].abs().max() < 2e-5
    assert (mine - output)[present].abs().max() < 2e-5


@pytest.mark.parametrize("number", range(LAYERS))
def test_a_hook_sees_full_length_on_both_sides_of_its_layer(model, number):
    seen = []
    model.model.layers[number].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad(), prune(model, Scripted([Step(2, HALF)]), image_tokens=IMAGE):
        model(IDS)
    assert [(tuple(before.shape), tuple(after.shape)) for before, after in seen] == [((2, 12, WIDTH), (2, 12, WIDTH))]


@pytest.mark.parametrize("everywhere", [False, True])
def test_backward_hooks_see_the_oracles_gradients(model, everywhere):
    layers, script = list(model.model.layers), Scripted([Step(2, HALF)])
    weights = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(0))

    def gradients(context, everywhere):
        seen = {}

        def note(module, before, after):
            if module in layers:
                seen[layers.index(module)] = before[0], after[0]

        with context as run:
            if everywhere:
                handles = [modules.register_module_full_backward_hook(note)]
            else:
                handles = [layer.register_full_backward_hook(note) for layer in layers]
            try:
                (model.model(IDS, use_cache=False).last_hidden_state * weights).sum().backward()
            finally:
                for handle in handles:
                    handle.remove()
        return seen, run

    got, run = gradients(prune(model, script, image_tokens=IMAGE), everywhere)
    layout = run.trace.layout
    expected, _ = gradients(masked(model.model, layout, script), False)
    assert sorted(got) == list(range(LAYERS))
    present = layout.valid & ~layout.image_tokens  # the oracle takes the others around the layers
    for number, pair in got.items():
        for mine, oracles in zip(pair, expected[number], strict=True):
            assert mine.shape == oracles.shape == (2, 12, WIDTH)
            torch.testing.assert_close(mine[present], oracles[present], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], [3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3]])
def test_packed_prompts_are_refused_by_name(model, positions):
    ids, image = IDS[:1], IMAGE[:1]
    packed = torch.tensor([positions])
    half = Keep(HALF.index[:1])
    with torch.no_grad():
        with (
            prune(model, Scripted([Step(1, half)]), image_tokens=image),
            pytest.raises(UnsupportedError, match="prompts packed into one row"),
        ):
            model(ids, position_ids=packed)
        with prune(model, Scripted([]), image_tokens=image):  # nothing is pruned, so nothing can go wrong
            assert torch.equal(model(ids, position_ids=packed).logits, model(ids, position_ids=packed).logits)


def test_positions_with_gaps_and_left_padding_are_no_packing(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = 0
    ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1) * 3
    with torch.no_grad(), prune(model, Scripted([Step(1, HALF)]), image_tokens=IMAGE) as run:
        model(IDS, attention_mask=mask, position_ids=ids)
    assert run.trace.active(1).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: model.__reduce_ex__(2) and copy.copy(model.layers)])
def test_a_model_is_not_copied_under_a_context(model, how):
    with (
        prune(model, Scripted([Step(1, HALF)]), image_tokens=IMAGE),
        pytest.raises(UnsupportedError, match="cannot be copied or pickled under"),
    ):
        copy.deepcopy(how(model.model))
    copy.deepcopy(model)


def test_a_layer_called_by_itself_is_the_layer(model):
    states = torch.randn(1, 5, WIDTH)
    tables = model.model.rotary_emb(states, torch.arange(5)[None])
    layer = model.model.layers[1]
    with torch.no_grad():
        expected = layer(states, position_embeddings=tables)
        with prune(model, Scripted([Step(1, HALF)]), image_tokens=IMAGE):
            assert torch.equal(layer(states, position_embeddings=tables), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, 5, 12, 15])
def test_guidance_runs_a_second_stream_of_text_beside_the_prompt(model, negative, use_cache):
    """Whatever its length, none of it is taken for image tokens: the untouched model gives what it should give."""
    draw, untouched = torch.Generator().manual_seed(1), copy.deepcopy(model)
    other = IDS[:, -1:] if negative is None else torch.randint(1, 64, (2, negative), generator=draw)
    script = Scripted([Step(1, HALF)], positions="renumber")
    scale, tokens = 2.0, []
    asked = {} if negative is None else {"negative_prompt_ids": other}
    with torch.no_grad(), prune(model, script, image_tokens=IMAGE) as run:
        ids, beside = IDS, other
        for _ in range(5):  # by recomputation, each stream in forwards of its own
            guided = [
                own(x, use_cache=False).logits[:, -1].log_softmax(-1) for own, x in ((model, ids), (untouched, beside))
            ]
            token = (scale * (guided[0] - guided[1]) + guided[1]).argmax(-1, keepdim=True)
            tokens.append(token)
            ids, beside = torch.cat((ids, token), 1), torch.cat((beside, token), 1)
        got = model.generate(
            IDS,
            guidance_scale=scale,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=use_cache,
            **asked,
        )
        assert run.trace.ledger.image_tokens == (6, 6)
    assert torch.equal(got[:, 12:], torch.cat(tokens, 1))


def test_marks_are_for_their_prompt_its_rows_repeated_and_what_has_grown_from_it(model):
    other = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    grown = torch.cat((IDS, other[:, :3]), 1)
    strategy = Scripted([Step(1, HALF)])
    wider = torch.cat((IMAGE, torch.zeros(2, 3, dtype=torch.bool)), 1)
    with torch.no_grad():
        with prune(model, strategy, image_tokens=wider):
            expected = model(grown, use_cache=False).logits
        with prune(model, strategy, image_tokens=IMAGE):
            for call in (lambda: model(other), lambda: model(grown), lambda: model(IDS[:, :5])):
                with pytest.raises(InputError, match="neither its prompt nor that prompt followed by generated tokens"):
                    call()
            model(IDS)
            assert torch.equal(model(grown, use_cache=False).logits, expected)
            with pytest.raises(InputError, match="neither its prompt nor that prompt followed by generated tokens"):
                model(other)
            with pytest.raises(InputError, match="neither its prompt nor that prompt followed by generated tokens"):
                model.generate(other, max_new_tokens=2)


def test_marks_of_several_rows_are_for_each_row_repeated_not_for_the_batch_repeated(model):
    image = IMAGE.clone()
    image[1] = image[1].roll(2)
    strategy = EverySecond()
    with torch.no_grad():
        with prune(model, strategy, image_tokens=image):
            expected = model(IDS).logits
            got = model(IDS.repeat_interleave(2, 0)).logits
            with pytest.raises(InputError, match="the mask has 2 rows for a batch of 4"):
                model(IDS.repeat(2, 1))
        with prune(model, strategy, image_tokens=IMAGE[:1]):  # one row is for all
            one = [model(IDS[row : row + 1]).logits for row in (0, 1)]
            both = model(IDS).logits
    assert (got - expected.repeat_interleave(2, 0)).abs().max() < 2e-5
    assert (both - torch.cat(one)).abs().max() < 2e-5


class EverySecond(Strategy):
    """The same tokens in every row, however many there are."""

    name = "every-second"

    def stages(self, shape):
        return [Stage("thin", 1)]

    def choose(self, stage, tokens):
        return Keep.where(tokens.exists & (torch.arange(tokens.exists.shape[1]) % 2 == 0))


def test_the_trace_is_the_latest_prefills(model):
    with torch.no_grad(), prune(model, Scripted([Step(1, HALF)]), image_tokens=IMAGE) as run:
        model(IDS)
        first = run.trace
        model(IDS.flip(0))
        assert run.trace is not first
    assert run.trace.stages


@pytest.mark.parametrize("script", [Scripted([]), Scripted([Step(1, HALF)])])
def test_continuous_batching_is_refused_by_name_where_it_is_called(model, script):
    if not hasattr(model, "init_continuous_batching"):
        pytest.skip("this release of transformers has no continuous batching")
    with prune(model, script, image_tokens=IMAGE):
        with pytest.raises(UnsupportedError, match=r"\(generate_batch\) is not supported under .*call generate\(\) on"):
            model.generate_batch([IDS[0].tolist()], max_new_tokens=2)
        model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
