"""What strategies read of the towers of transformers' own vision-language models, held to what the models compute."""

from __future__ import annotations

import pytest
import torch
import vlm_families
from PIL import Image
from vlm_families import FAMILIES, READABLE, generates_otherwise
from vlm_known import (
    CASES,
    PACKED,
    PADDED_RUNS,
    PROJECTING,
    REORDERED,
    RUNS,
    SEPARATED,
    WITH_CLS,
    WITH_VIDEO,
    model_of,
    patch_places,
)
from vlm_states import states_of
from vlm_watching import (
    Eager,
    Reader,
    attention_of,
    blocks_of,
    contributions,
    decoder_input,
    encoded,
    inputs_of,
    mixed,
    projector_of,
    read,
    separators,
)

import tokenprune
from tokenprune.core.reads import (
    ClsAttention,
    Embeddings,
    Projector,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
)
from tokenprune.errors import IncompatibleError, InputError
from tokenprune_adapters.hf.families import FAMILIES as KNOWN

names = pytest.mark.parametrize("name", READABLE)
runs = pytest.mark.parametrize(("name", "case"), RUNS)
SHRUNK = {("llava_onevision", "two sizes"), ("llava_onevision", "videos")}  # projected tokens are interpolated
CROPPED = [run for run in RUNS if not run[0].startswith(PACKED)]


def kept(name, inputs):
    """Bool [T]: which of the merged features are image tokens."""
    model = model_of(name)
    return ~separators(name, model, inputs)[FAMILIES[name].image_tokens(inputs)]


def every(name):
    reads = [TowerFeatures(), ReceivedAttention(), TowerKeys(), TowerStates(0, -1), Embeddings()]
    return reads + [Projector()] * (name in PROJECTING) + [ClsAttention()] * (name in WITH_CLS)


@pytest.mark.parametrize(("name", "case", "padding"), [run for run in PADDED_RUNS if run[0] in PROJECTING])
def test_projected_features_are_the_embeddings(name, case, padding):
    inputs = inputs_of(name, case, padding)
    seen, _ = read(model_of(name), Reader(TowerFeatures(), Embeddings(), Projector()), inputs)
    exists = seen["exists"]
    where = FAMILIES[name].image_tokens(inputs) & ~separators(name, model_of(name), inputs)
    assert exists.sum() == where.sum()
    assert torch.equal(seen["embeddings"][exists], decoder_input(name, model_of(name), inputs)[where])
    assert not seen["features"][~exists].any()
    difference = (seen["project"](seen["features"]) - seen["embeddings"])[exists].abs().max()
    assert (difference < 1e-5) == ((name, case) not in SHRUNK)


@runs
def test_towers_are_read_as_eager_attention_computes(name, case):
    """Every layer, mapped to tokens by what each patch contributes to them."""
    inputs, weights = inputs_of(name, case), contributions(name, case)
    eager, tokens = Eager(name, inputs), kept(name, inputs)
    for layer in range(len(blocks_of(model_of(name)))):
        reads = [ReceivedAttention(layer), TowerKeys(layer)] + ([ClsAttention(layer)] if name in WITH_CLS else [])
        seen, _ = read(model_of(name), Reader(*reads), inputs)
        exists = seen["exists"]
        expected = (weights @ eager.received(layer))[tokens, 0]
        assert torch.allclose(seen["received_attention"][exists], expected, atol=1e-6)
        assert torch.allclose(seen["keys"][exists], (weights @ eager.keys(layer))[tokens], atol=1e-5)
        if name in WITH_CLS:
            assert torch.allclose(seen["cls_attention"][exists], (weights @ eager.cls(layer))[tokens, 0], atol=1e-6)


@runs
def test_mean_states_are_those_between_the_layers(name, case):
    """Mapped to tokens by what each patch contributes to them."""
    inputs, weights = inputs_of(name, case), contributions(name, case)
    states, tokens = states_of(name, inputs), kept(name, inputs)
    last = len(states) - 1
    for wanted in (TowerStates(), TowerStates(0, 0), TowerStates(0, -1), TowerStates(0.5, -1), TowerStates(1, 1)):
        seen, _ = read(model_of(name), Reader(wanted), inputs)
        mean = torch.stack([states[number] for number in wanted.numbers(last)]).mean(0)
        assert torch.allclose(seen["tower_states"][seen["exists"]], (weights @ mean)[tokens], atol=1e-5), wanted


@names
def test_contributions_are_those_that_the_family_is_known_for(name):
    """So that the tests above cover what they claim: windows, pooling, packing, shrinking."""
    inputs = inputs_of(name)
    weights = contributions(name, "two sizes")[kept(name, inputs)]
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-5)
    patches = {int(count) for count in (weights.abs() > 1e-6).sum(1)}
    one = {"llava", "llava_siglip", "llava_pixtral", "vipllava", "janus", "llava_next", "llava_next_video"}
    one |= {"deepseek_vl", "deepseek_vl_hybrid", "paligemma", "paligemma2", "video_llava", "video_llama_3"}
    assert patches == ({1} if name in one else {1, 4} if name == "llava_onevision" else {4})
    consecutive = torch.equal(weights.argmax(1) // 4, torch.arange(len(weights)))
    assert consecutive == (name.startswith(PACKED) and name not in REORDERED)


@pytest.mark.parametrize(("name", "case"), CROPPED)
def test_grid_cells_lie_where_their_patches_lie(name, case):
    """In each picture, all tokens of a grid row show the same rows of patches, further down row by row; so columns."""
    inputs = inputs_of(name, case)
    seen, _ = read(model_of(name), Reader(), inputs)
    weights = contributions(name, case)[kept(name, inputs)]
    centres = weights @ patch_places(name, inputs).float()
    exists = seen["exists"]
    rows = torch.arange(2)[:, None].expand_as(exists)[exists]
    pictures = torch.stack((rows, seen["image"][exists]), 1)
    for picture in pictures.unique(dim=0):
        inside = (pictures == picture).all(1)
        for axis in (0, 1):
            cells, places = seen["grid"][exists][inside][:, axis], centres[inside][:, axis]
            by_cell = [places[cells == cell] for cell in range(int(cells.max()) + 1)]
            assert all((group - group[0]).abs().max() < 1e-3 for group in by_cell)
            starts = torch.stack([group[0] for group in by_cell])
            assert len(starts) == 1 or (starts.diff() > 0.9).all()


@pytest.mark.parametrize("name", [name for name in READABLE if name.startswith(PACKED)])
@pytest.mark.parametrize("cell", [(0, 3), (1, 2), (2, 0)])
def test_a_grid_cell_shows_its_part_of_the_picture(name, cell, monkeypatch):
    """Darkening eight by eight pixels changes the raw patches of one token, or of four; windowed orders come later."""
    plain = FAMILIES[name].inputs(CASES["two sizes"])
    draw = vlm_families._picture

    def darkened(height, width, generator):
        picture = draw(height, width, generator)
        picture.paste(Image.new("RGB", (8, 8)), (8 * cell[1], 8 * cell[0]))
        return picture

    monkeypatch.setattr(vlm_families, "_picture", darkened)
    first = plain["image_grid_thw"][0].prod()
    changed = (
        (FAMILIES[name].inputs(CASES["two sizes"])["pixel_values"] != plain["pixel_values"])[:first]
        .flatten(1)
        .any(1)
        .nonzero()
        .flatten()
    )
    tokens, cells = (changed // 4).unique(), [list(cell)]
    if name in ("paddleocr_vl", "hunyuan_vl"):  # row by row
        tokens = (changed // 8 // 2 * 4 + changed % 8 // 2).unique()
    elif name.startswith("muse"):  # raw patches in row-major order
        columns = int(plain["image_grid_thw"][0, 2])
        tokens = (changed // columns // 2 * (columns // 2) + changed % columns // 2).unique()
    elif name == "video_llama_3":  # a token each
        tokens, cells = changed, [[2 * cell[0] + row, 2 * cell[1] + column] for row in (0, 1) for column in (0, 1)]
    seen, _ = read(model_of(name), Reader(), plain)
    assert len(changed) == 4
    assert seen["grid"][0, tokens].tolist() == cells
    assert not seen["image"][0, tokens].any()


@pytest.mark.parametrize(("name", "case"), [run for run in CROPPED if run[0] in (*SEPARATED, "gemma3", "paligemma")])
def test_features_are_what_the_projector_is_given_packed_like_the_tokens(name, case):
    """Shrunk tokens too, although their projection is not that of their features."""
    inputs, given = inputs_of(name, case), []
    handle = projector_of(model_of(name)).register_forward_hook(lambda module, args, output: given.append(args[0]))
    encoded(model_of(name), inputs)
    handle.remove()
    patches = torch.cat([part.flatten(0, -2) for part in given])
    expected = patches
    if (name, case) != ("llava_next_video", "videos"):  # whose patches are pooled before the projector
        expected = contributions(name, case)[kept(name, inputs)] @ patches
    seen, _ = read(model_of(name), Reader(TowerFeatures()), inputs)
    assert torch.allclose(seen["features"][seen["exists"]], expected, atol=1e-5)


@names
def test_sdpa_and_eager_towers_are_read_alike(name):
    inputs, reads = inputs_of(name), every(name)
    ours, _ = read(model_of(name), Reader(*reads), inputs)
    theirs, _ = read(model_of(name, "eager"), Reader(*reads), inputs)
    for field in ("features", "received_attention", "keys", "tower_states", "embeddings"):
        assert torch.allclose(ours[field], theirs[field], atol=1e-5)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_masked_patches_are_no_keys_of_the_tower(name):
    inputs = inputs_of(name)
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][0, 0, 8:] = 0
    expected = contributions(name, "two sizes") @ Eager(name, inputs).received(0)
    seen, _ = read(model_of(name), Reader(ReceivedAttention(0)), inputs)
    assert torch.allclose(seen["received_attention"][seen["exists"]], expected[:, 0], atol=1e-6)
    assert seen["received_attention"][0, 2:4].abs().max() == 0


@pytest.mark.parametrize("name", ["mistral3", "llava_pixtral"])
def test_images_in_one_sequence_of_the_tower_receive_what_they_receive_alone(name):
    both, _ = read(model_of(name), Reader(ReceivedAttention(0)), inputs_of(name))
    for row, size in enumerate(CASES["two sizes"]):
        alone, _ = read(model_of(name), Reader(ReceivedAttention(0)), FAMILIES[name].inputs([size], first=row))
        received = alone["received_attention"][0]
        assert torch.allclose(both["received_attention"][row, : len(received)], received, atol=1e-6)


@names
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2, "use_cache": False}],
    ids=str,
)
def test_generate_reads_what_a_forward_reads(name, options):
    """However often a row is returned; without a cache, where every step is a prefill of a longer prompt."""
    if reason := generates_otherwise(name, options):
        pytest.skip(reason)
    model, inputs = model_of(name), inputs_of(name)
    once, trace = read(model, Reader(*every(name)), inputs)

    def generate():
        model.generate(**inputs, max_new_tokens=2, **options)

    seen, other = read(model, Reader(*every(name)), inputs, generate)
    times = 2 if {"num_return_sequences", "num_beams"} & set(options) else 1
    for field in ("features", "received_attention", "keys", "tower_states", "embeddings", "grid", "image", "exists"):
        assert torch.allclose(seen[field], once[field].repeat_interleave(times, 0), atol=1e-5), field
    placeholders = trace.layout.image_tokens.repeat_interleave(times, 0)
    assert torch.equal(other.layout.image_tokens[:, : placeholders.shape[1]], placeholders)
    assert not other.layout.image_tokens[:, placeholders.shape[1] :].any()


@pytest.mark.parametrize("name", [name for name in WITH_VIDEO if not KNOWN[name].one_token])
def test_a_video_and_an_image_in_one_prompt(name):
    """The image comes last in the prompt, but its tower runs first."""
    reads = TowerFeatures(), ReceivedAttention(), TowerKeys(0), TowerStates(1, -1)
    seen, trace = read(model_of(name), Reader(*reads), mixed(name))
    parts = [FAMILIES[name].inputs(CASES["videos"][:1]), FAMILIES[name].inputs([(24, 32)])]
    alone = [read(model_of(name), Reader(*reads), part)[0] for part in parts]
    for field in ("features", "received_attention", "keys", "tower_states", "grid"):
        assert torch.allclose(seen[field], torch.cat([one[field] for one in alone], 1), atol=1e-5), field
    video = alone[0]["image"]
    assert torch.equal(seen["image"], torch.cat((video, alone[1]["image"] + video.max() + 1), 1))
    assert trace.layout.counts.tolist() == [seen["exists"].shape[1]]


@names
def test_what_is_not_read_costs_nothing(name):
    """No tower layer is tapped that nobody reads, and none while the decoder runs."""
    model, inputs, tapped = FAMILIES[name].build(), inputs_of(name), []
    attentions = [attention_of(block) for block in blocks_of(model)]
    configs = [attention.config for attention in attentions]

    def look(module, args, kwargs=None):
        tapped.extend(n for n, one in enumerate(attentions) if one.config is not configs[n])

    handles = [attention.register_forward_pre_hook(look) for attention in attentions]
    features = [TowerFeatures()] + [Projector()] * (name in PROJECTING)
    for reads, expected in (((), set()), (features, set()), ((ReceivedAttention(1),), {1})):
        tapped.clear()
        read(model, Reader(*reads), inputs)
        assert set(tapped) == expected
    tapped.clear()
    handles.append(FAMILIES[name].decoder(model).layers[0].register_forward_pre_hook(look))
    for handle in handles[:-1]:
        handle.remove()
    read(model, Reader(ReceivedAttention()), inputs)
    assert not tapped


@names
def test_a_tower_layer_that_is_not_there_is_refused_at_the_opening(name):
    total = len(blocks_of(model_of(name)))
    with (
        pytest.raises(InputError, match=f"tower layer {total} .* has {total} layers"),
        tokenprune.prune(model_of(name), Reader(TowerKeys(total))),
    ):
        pass
    with (
        pytest.raises(InputError, match=f"tower states 1 to {total + 1} .* has {total} layers, states 0 … {total}"),
        tokenprune.prune(model_of(name), Reader(TowerStates(1, total + 1))),
    ):
        pass


@pytest.mark.parametrize("name", [name for name in READABLE if name not in WITH_CLS])
def test_cls_attention_is_refused_where_there_is_no_cls(name):
    with (
        pytest.raises(IncompatibleError, match="ClsAttention"),
        tokenprune.prune(model_of(name), Reader(ClsAttention())),
    ):
        pass
