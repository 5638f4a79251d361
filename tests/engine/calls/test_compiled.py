"""Models that go through torch.compile: each way and order gives what the plain model gives, or is refused by name."""

from __future__ import annotations

import types
from contextlib import contextmanager

import pytest
import torch
from model_state import state
from oracle_cases import CACHES, empty_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import BoundModel, PromptMasks, VisionCapture, prune, pruning
from tokenprune.errors import UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

LENGTH = 12
TOLERANCE = 1e-5


class Half(Strategy):
    """Half of the image tokens from layer 1 on: every second one, or those with the most attention."""

    name = "half"

    def __init__(self, *reads):
        super().__init__()
        self._reads = reads

    def stages(self, shape):
        yield Stage("half", 1, reads=self._reads)

    def choose(self, stage, tokens):
        if self._reads:
            return Keep.top(tokens.attention, tokens.count(0.5))
        return Keep.where(tokens.exists & (torch.arange(tokens.exists.shape[1]) % 2 == 0))


READS = {
    "no reads": (),
    "attention before": (AttentionFrom("last"),),
    "attention next": (AttentionFrom("last", layer="next"),),
}


def ids_of(batch=2, length=LENGTH):
    return torch.arange(batch * length).reshape(batch, length) % 64


def image_of(batch=2, length=LENGTH):
    image = torch.zeros(batch, length, dtype=torch.bool)
    image[:, 2 : length - 4] = True
    return image


# the ways to compile: each takes the model, and gives what is called and what is handed to prune ----------------------


def wrapped(model, **options):
    return torch.compile(model, **options), model


def wrapped_and_pruned_itself(model, **options):
    fast = torch.compile(model, **options)
    return fast, fast


def in_place(model, **options):
    model.compile(**options)
    return model, model


def decoder_in_place(model, **options):
    model.model.compile(**options)
    return model, model


def decoder_wrapped(model, **options):
    model.model = torch.compile(model.model, **options)
    return model, model


def layers_in_place(model, **options):
    for layer in model.model.layers:
        layer.compile(**options)
    return model, model


def layers_wrapped(model, **options):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, **options)
    return model, model


def forward_of_the_model(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model, model


def forward_of_the_layers(model, **options):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, **options)
    return model, model


def attention_in_place(model, **options):
    for layer in model.model.layers:
        layer.self_attn.compile(**options)
    return model, model


def function_around(model, **options):
    return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), **options), model


ROUTES = [
    wrapped,
    wrapped_and_pruned_itself,
    in_place,
    decoder_in_place,
    decoder_wrapped,
    layers_in_place,
    layers_wrapped,
    forward_of_the_model,
    forward_of_the_layers,
    attention_in_place,
    function_around,
]
WHEN = ["cold", "warm", "warm by another", "inside"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.made = 0

    def __call__(self, graph, inputs):
        self.made += 1
        return graph.forward

    def during(self, call):
        before = self.made
        call()
        return self.made - before


def talk(called):
    """Logits of a prefill and of a step on its cache."""
    output = called(ids_of(), use_cache=True)
    step = called(ids_of()[:, :1], past_key_values=output.past_key_values, use_cache=True)
    return torch.cat((output.logits, step.logits), 1)


def pruned(called, target, strategy):
    with prune(target, strategy, image_tokens=image_of()) as run:
        logits = talk(called)
    return logits, [stage.active.tolist() for stage in run.trace.stages]


def check(route, when, reads):
    strategy, backend = Half(*READS[reads]), Graphs()
    model = tiny_llama(2)
    plain = talk(model)
    expected, kept = pruned(model, model, strategy)
    assert not torch.allclose(expected, plain)
    if when == "warm by another":
        route(tiny_llama(2, seed=1), backend=backend)[0](ids_of(), use_cache=True)
    if when == "inside":
        with prune(model, strategy, image_tokens=image_of()) as run:
            called, _ = route(model, backend=backend)
            logits = talk(called)
        found = [stage.active.tolist() for stage in run.trace.stages]
    else:
        called, target = route(model, backend=backend)
        if when == "warm":
            assert torch.allclose(called(ids_of(), use_cache=True).logits, plain[:, :LENGTH], atol=TOLERANCE)
            assert backend.made, "nothing was compiled"
        logits, found = pruned(called, target, strategy)
    assert found == kept
    assert (logits - expected).abs().max() < TOLERANCE
    after = called(ids_of(), use_cache=True).logits
    assert torch.allclose(after, plain[:, :LENGTH], atol=TOLERANCE), "afterwards it is not the plain model"
    assert backend.made, "nothing was compiled"


@pytest.mark.parametrize("route", [wrapped, decoder_in_place, layers_wrapped])
def test_warm_code_is_pruned_in_every_way_of_compiling(route):
    check(route, "warm", "no reads")


@pytest.mark.parametrize(
    ("when", "reads"),
    [("cold", "no reads"), ("warm by another", "no reads"), ("inside", "no reads"), ("warm", "attention before")],
)
def test_orders_and_reads(when, reads):
    check(layers_in_place, when, reads)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("when", WHEN)
def test_every_way_order_and_read(route, when):
    """Every two of a way, an order and a read; not every three."""
    reads = [*READS][(ROUTES.index(route) + WHEN.index(when)) % len(READS)]
    check(route, when, reads)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_of_a_compiled_model(cache):
    model = tiny_llama(2)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": cache, "attention_mask": torch.ones_like(ids_of())}
    options["attention_mask"][1, :2] = 0
    with prune(model, Half(), image_tokens=image_of()):
        expected = model.generate(ids_of(), **options)
    assert not torch.equal(model.generate(ids_of(), **options), expected)
    in_place(model, backend="eager")
    with prune(model, Half(), image_tokens=image_of()):
        assert torch.equal(model.generate(ids_of(), **options), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_the_layers_of_a_stage_share_a_graph(cache):
    """Of more layers than PyTorch has graphs for one piece of code. Caches are told from each other by layer."""
    backend, model = Graphs(), tiny_llama(9)
    fast = torch.compile(model, backend=backend)
    cache = empty_cache(cache, model, 32)
    with prune(model, Half(), image_tokens=image_of()):
        assert backend.during(lambda: fast(ids_of(), past_key_values=cache)) == 2  # layer 0 and the others
        made = [backend.during(lambda: fast(ids_of()[:, :1], past_key_values=cache)) for _ in range(10)]
    # a growing cache has other shapes in the second step, from which on they are dynamic
    assert made == [2, 2 if isinstance(cache, DynamicCache) else 0, *[0] * 8]


def test_caches_of_one_length_share_graphs():
    backend, model = Graphs(), tiny_llama(3)
    fast = torch.compile(model, backend=backend)

    def answer():
        cache = empty_cache("static", model, 20)
        with prune(model, Half(), image_tokens=image_of()):
            return [fast(ids, past_key_values=cache).logits for ids in (ids_of(), ids_of()[:, :1], ids_of()[:, 1:2])]

    answer()
    assert backend.during(answer) == 0


def test_layers_that_cannot_share_graphs_have_their_own():
    model = tiny_llama(11)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.scaling = 0.3 + number / 100  # a constant in compiled code
    with prune(model, Half(), image_tokens=image_of()):
        expected = model(ids_of(), use_cache=False).logits
    backend = Graphs()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    with prune(model, Half(), image_tokens=image_of()):
        assert (fast(ids_of(), use_cache=False).logits - expected).abs().max() < TOLERANCE
    assert backend.made == 11


def test_no_number_of_tokens_makes_a_graph_but_the_first_two():
    layers = 2
    backend, model = Graphs(), tiny_llama(layers)
    fast = torch.compile(model, backend=backend)

    def call(length, step=True):
        with prune(model, Half(), image_tokens=image_of(length=length)):
            cache = fast(ids_of(length=length), use_cache=True).past_key_values
            if step:
                fast(ids_of()[:, :1], past_key_values=cache, use_cache=True)

    assert backend.during(lambda: call(12, step=False)) == layers
    assert backend.during(lambda: call(12, step=False)) == 0
    assert backend.during(lambda: call(15, step=False)) == layers  # with dynamic shapes
    call(15)
    call(17)
    assert [backend.during(lambda length=length: call(length)) for length in (13, 20, 31, 12)] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("route", "reads"),
    [
        (wrapped, "attention next"),
        (wrapped_and_pruned_itself, "attention before"),
        (in_place, "attention next"),
        (decoder_in_place, "no reads"),
        (decoder_in_place, "attention before"),
    ],
)
def test_fullgraph_holds_for_the_layers(route, reads):
    model, strategy = tiny_llama(2), Half(*READS[reads])
    with prune(model, strategy, image_tokens=image_of()):
        expected = model(ids_of(), use_cache=False).logits
    called, target = route(model, backend="eager", fullgraph=True)
    with prune(target, strategy, image_tokens=image_of()):
        logits = called(ids_of(), use_cache=False).logits
    assert (logits - expected).abs().max() < TOLERANCE


def compiled_once(model):
    fast = torch.compile(model, backend="eager")
    fast(ids_of(), use_cache=False)

    def call(ids, **options):
        with torch.compiler.set_stance("fail_on_recompile"):
            return fast(ids, **options)

    return call


def exported(strict):
    return lambda model: lambda ids, **options: torch.export.export(model, (ids,), options, strict=strict)


class Logits(torch.nn.Module):
    """What torch.jit.trace can take."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def traced(model):
    return lambda ids, **options: torch.jit.trace(Logits(model), (ids,), check_trace=False)


def faked(model):
    def call(ids, **options):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return model(mode.from_tensor(ids), **options)

    return call


REFUSED = {
    "a function around the model": (lambda m: function_around(m, backend="eager", fullgraph=True)[0], "fullgraph=True"),
    "layers": (lambda m: layers_in_place(m, backend="eager", fullgraph=True)[0], "fullgraph=True"),
    "attention": (lambda m: attention_in_place(m, backend="eager", fullgraph=True)[0], "fullgraph=True"),
    "fail_on_recompile": (compiled_once, "the stance 'fail_on_recompile'"),
    "export": (exported(False), "torch.export is not supported under"),
    "strict export": (exported(True), "strict torch.export are not supported under"),
    "torch.jit.trace": (traced, "torch.jit.trace is not supported under"),
    "FakeTensor": (faked, "FakeTensor"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compiled_is_refused_by_its_own_name(case):
    made, message = REFUSED[case]
    model = tiny_llama(2)
    expected = model(ids_of(), use_cache=False).logits
    called, before = made(model), state(model)
    with (
        pytest.raises(UnsupportedError, match=message) as caught,
        prune(model, Half(*READS["attention before"]), image_tokens=image_of()),
    ):
        called(ids_of(), use_cache=False)
    assert "\n" not in str(caught.value)
    assert state(model) == before
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(ids_of(), use_cache=False).logits, expected)


@pytest.mark.parametrize("error", [RuntimeError("mine"), ValueError("fullgraph"), KeyError("mine")])
def test_errors_of_the_user_stay_theirs(error):
    with pytest.raises(type(error)) as caught, prune(tiny_llama(2), Half(), image_tokens=image_of()):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_stances_that_run_eagerly_are_pruned(stance):
    model = tiny_llama(2)
    expected, _ = pruned(model, model, Half())
    called, _ = in_place(model, backend="eager")
    talk(called)
    with torch.compiler.set_stance(stance):
        logits, _ = pruned(called, model, Half())
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("when", ["inside", "behind"])
def test_a_forward_that_was_compiled_inside_does_not_prune_behind_the_context(when):
    """`torch.compile(model.forward)` holds what stood there when it was called."""
    model = tiny_llama(2)
    plain = talk(model)
    with prune(model, Half(), image_tokens=image_of()):
        kept = torch.compile(model.forward, backend="eager"), model.model.layers[1].forward
        if when == "inside":
            talk(kept[0])
    assert (talk(kept[0]) - plain).abs().max() < TOLERANCE
    model.model.layers[1].forward = kept[1]
    assert (talk(model) - plain).abs().max() < TOLERANCE


# adapters that follow the model by hooks -----------------------------------------------------------------------------


class Hooked(BoundModel, VisionCapture):
    """Notes where the model's input holds a token, by a forward hook on one of its modules."""

    name, tower_layers, source = "hooked", 0, "adapter 'hooked' of package 'mine'"

    def __init__(self, model, part):
        self.decoder, self._part, self.seen = model.model, part, 0

    def offers(self):
        return frozenset()

    @contextmanager
    def capture(self, reads):
        handle = self._part.register_forward_pre_hook(self._note)
        try:
            yield self
        finally:
            handle.remove()

    def _note(self, module, args):
        self.seen += 1

    def prompt_masks(self, queries):
        assert self.seen, "its hook was not called"
        return PromptMasks(image_of(), queries)

    def provide(self, read):
        raise AssertionError("nothing is offered")


@pytest.fixture
def hooked(monkeypatch):
    def bind(model, part):
        monkeypatch.setattr(pruning, "bound_model_of", lambda _: Hooked(model, part))
        return model

    return bind


@pytest.mark.parametrize("route", [wrapped, in_place, function_around])
def test_hooks_of_an_adapter_that_compiled_code_may_not_call_are_refused(hooked, route):
    model = tiny_llama(2)
    hooked(model, model)
    called, target = route(model, backend="eager")
    called(ids_of(), use_cache=False)
    with (
        pytest.raises(
            UnsupportedError, match="'hooked' of package 'mine' observes LlamaForCausalLM with forward hooks"
        ),
        tokenprune.prune(target, Half()),
    ):
        called(ids_of(), use_cache=False)


@pytest.mark.parametrize("route", [wrapped, in_place])
def test_hooks_of_an_adapter_on_the_parts_of_a_compiled_model_are_called(hooked, route):
    model = tiny_llama(2)
    hooked(model, model.model.embed_tokens)
    with prune(model, Half(), image_tokens=image_of()):
        expected = model(ids_of(), use_cache=False).logits
    called, target = route(model, backend="eager")
    called(ids_of(), use_cache=False)
    for _ in range(2):  # by each context anew
        with tokenprune.prune(target, Half()):
            assert (called(ids_of(), use_cache=False).logits - expected).abs().max() < TOLERANCE


@pytest.mark.slow
def test_the_default_backend():
    """Where there is a compiler for it."""
    model = tiny_llama(2)
    expected, kept = pruned(model, model, Half())
    fast = torch.compile(model)
    try:
        talk(fast)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no code can be compiled here: {error}")
    logits, found = pruned(fast, model, Half())
    assert found == kept
    assert (logits - expected).abs().max() < TOLERANCE


def test_functional_calls_are_pruned():
    model = tiny_llama(2)
    with prune(model, Half(), image_tokens=image_of()):
        expected = model(ids_of(), use_cache=False).logits
        called = types.MethodType(torch.func.functional_call, model)
        assert torch.equal(called(dict(model.named_parameters()), (ids_of(),), {"use_cache": False}).logits, expected)
