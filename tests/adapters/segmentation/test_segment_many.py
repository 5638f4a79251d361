"""`segment_many`: the results of `segment`, whatever runs together, with bounded memory, and whatever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_checkpoints import whole_clip
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from PIL import Image
from pixellm_checkpoints import write_pixellm
from segmentation_golden import Golden

import tokenprune as tp
from tokenprune.core.decisions import Decision
from tokenprune.core.reads import Pixels
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.datasets.shapes import Shapes
from tokenprune.errors import IncompatibleError, InputError, OptionError
from tokenprune.utils import stopwatch
from tokenprune_adapters.segmentation.many.joined import joined_value
from tokenprune_adapters.segmentation.many.many_images import ManyImages
from tokenprune_adapters.segmentation.many.stream import ImageResult
from tokenprune_adapters.segmentation.many.transfer import batched, pinned

LIMIT = 1e-4
LONG = "the thing that is behind the red car, to the left of the table and below everything else that can be seen"
SHAPES = ((45, 70), (70, 30), (50, 50), (45, 70), (33, 61))
STRATEGIES: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    ("none", {}),
    ("uniform", {"budget": 0.6}),
    ("fastv", {"budget": 0.6}),
    ("prumerge+", {}),
    ("csp", {"budget": 0.6, "clustering": "cls_attention", "query": "seg"}),
    ("csp", {"budget": 0.6, "clustering": "seg_first"}),
    ("csp", {"budget": 0.6, "clustering": "kmeans"}),
]
NAMES = [" ".join(map(str, (name, *options.values()))) for name, options in STRATEGIES]


def pictures(shapes: Iterable[tuple[int, int]] = SHAPES) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def requests() -> list[tuple[Any, Any]]:
    """Pictures of several sizes; one query, several, a sentence, a long one."""
    queries = ["the cat", ["the cat", LONG], ["Which of these can swim?"], LONG, ["a dog", "the cat", "it"]]
    return list(zip(pictures(), queries, strict=True))


@pytest.fixture(scope="module", params=[write_lisa, write_glamm, write_pixellm], ids=["lisa", "glamm", "pixellm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = request.param(tmp_path_factory.mktemp("model"))
    whole_clip(folder / "vision_tower")
    return tp.load(folder)


@pytest.fixture(scope="module")
def lisa(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tp.load(write_lisa(tmp_path_factory.mktemp("lisa")))


def check_equal(found: ImageResult, alone: Any) -> None:
    """The result of an image is that of `segment`."""
    result: Any = found.result
    assert found.error is None
    assert type(result) is type(alone)
    assert (result.masks.shape, result.mask_logits.dtype) == (alone.masks.shape, torch.float32)
    assert torch.allclose(result.mask_logits, alone.mask_logits, atol=LIMIT)
    unsure = alone.mask_logits.abs() < LIMIT
    assert torch.equal(result.masks | unsure, alone.masks | unsure)
    assert torch.allclose(result.low_res_logits, alone.low_res_logits, atol=LIMIT)
    assert torch.allclose(result.iou_predictions, alone.iou_predictions, atol=LIMIT)
    assert (result.text, result.query_index) == (alone.text, alone.query_index)
    assert getattr(result, "phrases", None) == getattr(alone, "phrases", None)
    assert (result.trace is None) == (alone.trace is None)
    if alone.trace is not None:
        rows = zip(result.row_index, alone.row_index, strict=True)
        assert all(result.trace.summary(row) == alone.trace.summary(own) for row, own in rows)


@pytest.mark.parametrize(("name", "options"), STRATEGIES, ids=NAMES)
def test_results_are_those_of_one_image_at_a_time(model: Any, name: str | None, options: dict[str, Any]) -> None:
    strategy = None if name is None else tp.strategy(name, **options)
    found = list(model.segment_many(requests(), strategy, batch_size=4, keep_logits=True))
    assert [one.index for one in found] == list(range(5))
    for one, (image, query) in zip(found, requests(), strict=True):
        check_equal(one, model.segment(image, query, strategy))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_any_batch_size(lisa: Any, batch_size: int) -> None:
    found = lisa.segment_many(requests(), batch_size=batch_size, keep_logits=True)
    for one, (image, query) in zip(found, requests(), strict=True):
        check_equal(one, lisa.segment(image, query))


def test_every_prompt_has_a_row_of_the_trace_with_or_without_a_mask(model: Any) -> None:
    fastv = tp.strategy("fastv", budget=0.6)
    rows: list[int] = []
    for done in model.segment_many(requests()[:3], fastv, "generate", batch_size=16, max_new_tokens=2):
        result: Any = done.result
        rows += result.prompt_rows
        assert set(result.row_index) <= set(result.prompt_rows)
        alone = model.segment(done.image, requests()[done.index][1], fastv, answer="generate", max_new_tokens=2)
        for row, own in zip(result.prompt_rows, alone.prompt_rows, strict=True):
            assert result.trace.summary(row) == alone.trace.summary(own)
            assert result.trace.summary(row) in repr(result)


def test_generated_answers(model: Any) -> None:
    found = model.segment_many(requests(), answer="generate", max_new_tokens=6, keep_logits=True)
    for one, (image, query) in zip(found, requests(), strict=True):
        check_equal(one, model.segment(image, query, answer="generate", max_new_tokens=6))


@pytest.mark.parametrize("name", ["lisa", "glamm", "pixellm"])
@pytest.mark.parametrize(
    "strategy",
    [pytest.param(None, id="plain", marks=pytest.mark.slow), pytest.param(tp.strategy("csp", budget=0.6), id="csp")],
)
def test_masks_of_the_reference_checkpoints(
    golden: Callable[[str], Path], name: str, strategy: Strategy | None
) -> None:
    reference = Golden.read(golden(name))
    image = reference.image
    asked = [
        (image, "the cat on the left"),
        (np.ascontiguousarray(image[:, : image.shape[1] // 2]), ["the red car", LONG]),
        (np.ascontiguousarray(image.transpose(1, 0, 2)), "Which of these can swim?"),
    ]
    # random weights give logits around 0, where rounding decides, which depends on the processor
    found = reference.model.segment_many(asked, strategy, keep_logits=True)
    for one, (picture, query) in zip(found, asked, strict=True):
        check_equal(one, reference.model.segment(picture, query, strategy))


def test_masks_of_the_bundled_model() -> None:
    model = tp.load("lisa-tiny")
    asked = [(scene.image, [query.text for query in scene.queries]) for scene in Shapes().scenes("test", limit=10)]
    for strategy in (None, tp.strategy("csp", budget=0.35)):
        for one, (image, queries) in zip(model.segment_many(asked, strategy, batch_size=4), asked, strict=True):
            assert torch.equal(one.result.masks, model.segment(image, queries, strategy).masks)


def test_a_surrounding_context_prunes(lisa: Any) -> None:
    strategy = tp.strategy("fastv", budget=0.6)
    with tp.prune(lisa, strategy):
        found = list(lisa.segment_many(requests(), keep_logits=True))
    for one, (image, query) in zip(found, requests(), strict=True):
        check_equal(one, lisa.segment(image, query, strategy))


def test_kinds_of_images(lisa: Any, tmp_path: Path) -> None:
    array = pictures()[0]
    picture = Image.fromarray(array)
    picture.save(tmp_path / "image.png")
    kinds = [array, picture, tmp_path / "image.png", str(tmp_path / "image.png"), torch.from_numpy(array)]
    opened = Image.open(tmp_path / "image.png")  # whose pixels are read on first use, by one of the threads
    found = list(lisa.segment_many(((kind, "the cat") for kind in (*kinds, *[opened] * 6)), workers=4))
    assert len({one.result.masks.numpy().tobytes() for one in found}) == 1
    assert [one.image is kind for one, kind in zip(found, kinds, strict=False)] == [True] * 5


def test_encoded_images_among_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = requests()
    known = {number: model.encoded(pairs[number][0]) for number in (0, 3)}
    towers: list[int] = []
    encode = model.encode_prepared
    monkeypatch.setattr(model, "encode_prepared", lambda images: towers.append(len(images)) or encode(images))
    given = [(known.get(number, image), query) for number, (image, query) in enumerate(pairs)]
    for found, (image, query) in zip(model.segment_many(given, batch_size=8, keep_logits=True), pairs, strict=True):
        check_equal(found, model.segment(model.encode_image(image), query))
    assert towers[0] == len(pairs) - 2
    towers.clear()
    assert [done.error for done in model.segment_many([(known[0], "the cat")] * 3)] == [None] * 3
    assert not towers


# what fails -----------------------------------------------------------------------------------------------------------


def test_what_is_broken_does_not_lose_the_others(lisa: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    image, *_ = pictures()
    broken = [
        (tmp_path / "text.png", "the cat"),
        (tmp_path / "none.png", "the cat"),
        (image, ""),
        (image, ["the cat", 3]),
        (image, []),
        (image, "the [SEG]"),
        (image, "cat " * 3000),
        "photo.png",
        (image,),
        None,
    ]
    parts = ["text.png", "none.png", "query is empty", "a int", "empty list", "[SEG]", "maximum", *["a pair"] * 3]
    mixed = [request for one in broken for request in ((image, "the cat"), one)]
    found = list(lisa.segment_many(mixed, batch_size=4))
    assert [one.index for one in found] == list(range(20))
    wanted = lisa.segment(image, "the cat").masks
    assert all(torch.equal(one.result.masks, wanted) and one.error is None for one in found[::2])
    for one, part in zip(found[1::2], parts, strict=True):
        assert one.result is None
        assert isinstance(one.error, InputError)
        assert part in str(one.error)
        assert "\n" not in str(one.error)


def test_errors_are_raised_on_request_after_the_results_before_them(lisa: Any) -> None:
    image = pictures()[0]
    found = lisa.segment_many([(image, "the cat"), ("none.png", "the cat"), (image, "a dog")], on_error="raise")
    assert next(found).result is not None
    with pytest.raises(InputError, match=r"none\.png"):
        next(found)
    assert not ours()


class Picky(Strategy):
    """Refuses pictures whose first patch is black."""

    name = "picky"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One, of any tokens."""
        yield Stage("look", 0, reads=(Pixels(),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """All or an error."""
        if (tokens.pixels[:, :2, :2] == 0).flatten(1).all(1).any():
            raise InputError("too dark")
        return tp.Keep.top(tokens.exists.float(), tokens.exists.shape[1])


def test_an_image_that_a_strategy_refuses_is_found_among_its_batch(lisa: Any) -> None:
    images = pictures(((40, 40),) * 4)
    images[2][:20, :20] = 0
    found = list(lisa.segment_many([(image, "the cat") for image in images], Picky()))
    assert [one.error is None for one in found] == [True, True, False, True]
    assert "too dark" in str(found[2].error)
    for one, image in zip(found, images, strict=True):
        assert one.result is None or torch.equal(one.result.masks, lisa.segment(image, "the cat").masks)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"mask_size": "full"}, "mask_size='full' found, expected 'image', 'low' or (height, width)"),
        ({"mask_size": (3,)}, "mask_size"),
        ({"mask_size": (3, 0)}, "mask_size"),
        ({"mask_size": (99999, 99999)}, "at most 268,435,456 pixels"),
        ({"mask_size": (2**40, 2**40)}, "at most 268,435,456 pixels"),
        ({"mask_size": None}, "mask_size"),
        ({"answer": "maybe"}, "answer"),
        ({"on_error": "ignore"}, "on_error"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"strategy": "csp"}, "strategy"),
        ({"requests": "photo.png"}, "requests='photo.png' found, expected pairs (image, query)"),
        ({"requests": None}, "requests"),
    ],
)
def test_bad_arguments_are_refused_at_once(lisa: Any, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError) as caught:
        lisa.segment_many(**{"requests": [], **arguments})
    assert part in str(caught.value)


def test_an_incompatible_strategy_is_refused_before_anything_is_read(lisa: Any) -> None:
    taken: list[int] = []
    with pytest.raises(IncompatibleError, match="cdpruner"):
        lisa.segment_many((taken.append(1) for _ in range(3)), tp.strategy("cdpruner"))
    assert not taken


# memory and threads ---------------------------------------------------------------------------------------------------


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenprune-prefetch")]


def test_requests_are_taken_as_they_are_needed(lisa: Any) -> None:
    image = pictures()[0]
    taken = 0

    def endless() -> Iterator[tuple[Any, str]]:
        nonlocal taken
        while True:
            taken += 1
            yield image, "the cat"

    found = lisa.segment_many(endless(), batch_size=2)
    assert taken == 0
    for count in range(1, 8):
        next(found)
        assert taken <= count + 2 * 2 + 1
    found.close()
    assert not ours()


def test_pictures_are_freed_before_results_are_handed_out(lisa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0
    prepare = lisa.prepare_image

    class Counted:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    def counting(image: Any) -> Any:
        prepared = prepare(image)
        object.__setattr__(prepared, "counted", Counted())
        return prepared

    monkeypatch.setattr(lisa, "prepare_image", counting, raising=False)
    image = pictures()[0]
    for one in lisa.segment_many([(image, "the cat")] * 20, batch_size=3):
        assert one.result is not None
        assert len(alive) <= 4  # of the next batch, and one more
    assert most <= 2 * 3 + 1
    assert not alive


def test_an_interrupt_ends_the_threads(lisa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lisa, "answer", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        list(lisa.segment_many(requests() * 5, batch_size=2))
    assert not ours()


def test_an_error_of_the_requests_comes_after_the_results_before_it(lisa: Any) -> None:
    def ending() -> Iterator[tuple[Any, str]]:
        yield pictures()[0], "the cat"
        raise OSError("the drive is gone")

    found = lisa.segment_many(ending(), batch_size=1)
    assert next(found).result is not None
    with pytest.raises(OSError, match="the drive is gone"):
        next(found)


def test_stages_are_told(lisa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = lisa.low_res_logits_of

    def slow(*given: Any) -> Any:
        time.sleep(0.05)
        return draw(*given)

    monkeypatch.setattr(lisa, "low_res_logits_of", slow)
    with stopwatch.recorded() as times:
        list(lisa.segment_many(requests()))
    assert list(times) == ["preprocess", "vision tower", "mask encoder", "prefill", "mask decoder", "total"]
    assert times["mask decoder"] >= 50  # drawing the masks, not only resizing them


# sizes of masks -------------------------------------------------------------------------------------------------------


def returned_bytes(result: Any) -> int:
    """Bytes of the tensors of a result."""
    tensors = (value for value in vars(result).values() if isinstance(value, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)


def test_masks_have_the_size_asked_for_and_nothing_else_is_returned(model: Any) -> None:
    (image,) = pictures(((300, 400),))
    (whole,) = model.segment_many([(image, "the cat")], keep_logits=True)
    (plain,) = model.segment_many([(image, "the cat")])
    (low,) = model.segment_many([(image, "the cat")], mask_size="low")
    (small,) = model.segment_many([(image, "the cat")], mask_size=(30, 40))
    assert torch.equal(plain.result.masks, whole.result.masks)
    assert plain.result.mask_logits is None
    assert torch.equal(low.result.masks, low.result.low_res_logits > 0)
    wanted = torch.nn.functional.interpolate(whole.result.mask_logits[None], (30, 40), mode="bilinear")[0] > 0
    assert small.result.masks.shape == wanted.shape
    assert float((small.result.masks == wanted).float().mean()) > 0.85
    fixed = low.result.low_res_logits.nbytes + low.result.iou_predictions.nbytes
    assert returned_bytes(whole.result) == fixed + 5 * 300 * 400
    assert returned_bytes(plain.result) == fixed + 300 * 400
    assert returned_bytes(small.result) == fixed + 30 * 40
    assert returned_bytes(low.result) == fixed + low.result.low_res_logits.numel()
    assert ".mask_logits" not in repr(plain.result)


def test_logits_at_another_size(lisa: Any) -> None:
    (image,) = pictures(((45, 70),))
    (found,) = lisa.segment_many([(image, "the cat")], mask_size=[9, 7], keep_logits=True)
    assert found.result.mask_logits.shape == (1, 9, 7)
    assert torch.equal(found.result.masks, found.result.mask_logits > 0)
    (low,) = lisa.segment_many([(image, "the cat")], mask_size="low", keep_logits=True)
    assert low.result.mask_logits is low.result.low_res_logits


def linear(size: int, wanted: int) -> np.ndarray[Any, Any]:
    """[wanted, size]: linear interpolation between the middles of pixels, without torch."""
    places = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(size)), 0)


@pytest.mark.parametrize("shape", [(45, 70), (70, 30)])
@pytest.mark.parametrize("answer", ["forced", "generate"])
def test_segment_gives_masks_of_the_size_asked_for(model: Any, shape: tuple[int, int], answer: Any) -> None:
    (image,) = pictures((shape,))
    encoded = model.encode_image(image)
    asked = {"prompt": f"<image> {' '.join(model.seg_tokens)}"} if answer == "forced" else {"query": "the cat"}
    sizes, whole = encoded.prepared.sizes, model.segment(encoded, **asked, answer=answer)
    for size in ((30, 40), (130, 7), shape, "image", "low"):
        found = model.segment(encoded, **asked, answer=answer, mask_size=size)
        assert torch.equal(found.low_res_logits, whole.low_res_logits)
        if size == "low":
            assert torch.equal(found.masks, found.low_res_logits > 0)
            continue
        height, width = shape if size == "image" else size
        low = found.low_res_logits.shape[1]
        down, across = (
            linear(inside, side) @ linear(low, sizes.square)[:inside]
            for inside, side in zip(sizes.resized, (height, width), strict=True)
        )
        wanted = torch.from_numpy(down @ found.low_res_logits.double().numpy() @ across.T)
        assert torch.allclose(found.mask_logits.double(), wanted, atol=LIMIT)
        assert torch.equal(found.masks, found.mask_logits > 0)


@pytest.mark.parametrize("size", [0, (0, 3), (3, -1), (3,), (1, 2, 3), (2.5, 3), "large", None, True, ("image", 3)])
def test_sizes_that_are_no_sizes_are_refused_before_a_tower_runs(
    lisa: Any, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lisa, "encoded", None)  # which nothing may call
    with pytest.raises(OptionError, match="mask_size"):
        lisa.segment(pictures()[0], "the cat", mask_size=size)


# parts ----------------------------------------------------------------------------------------------------------------


def test_reads_of_several_images_are_aligned_with_their_rows() -> None:
    first, second = torch.ones(2, 3, 4), torch.full((1, 5, 4), 2.0)
    found = joined_value(tp.TowerFeatures(), [first, second])
    assert found.shape == (3, 5, 4)
    assert (found[:2, :3] == 1).all()
    assert (found[:2, 3:] == 0).all()
    assert (found[2] == 2).all()
    assert joined_value(tp.TowerFeatures(), [first]) is first
    with pytest.raises(InputError, match="one by one"):
        joined_value(Pixels(), [torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 6, 3)])


def test_pictures_of_a_batch_get_the_models_dtype() -> None:
    one = torch.ones(1, 3, 2, 2)
    assert batched([one], one) is one
    found = batched([one, one * 2], torch.zeros(1, dtype=torch.bfloat16))
    assert (found.shape, found.dtype, found[1, 0, 0, 0].item()) == ((2, 3, 2, 2), torch.bfloat16, 2)


def test_a_prepared_image_is_pinned(lisa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # as there may be no CUDA
    prepared = lisa.prepare_image(pictures()[0])
    found = pinned(prepared)
    assert torch.equal(found.clip_pixels, prepared.clip_pixels + 1)
    assert torch.equal(found.sam_pixels, prepared.sam_pixels + 1)
    assert found.sizes == prepared.sizes


def test_the_example() -> None:
    import doctest

    finder = doctest.DocTestFinder()
    (example,) = (case for case in finder.find(ManyImages.segment_many, "segment_many") if case.examples)
    assert doctest.DocTestRunner().run(example).failed == 0
