"""[CLS] rows, crops, values and states of towers of transformers' own models, against the tower run on its own."""

from __future__ import annotations

import pytest
import torch
from vlm_families import FAMILIES
from vlm_known import WITH_CLS, model_of
from vlm_watching import Reader, attention_of, blocks_of, inputs_of, read, tower_of

from tokenprune.core.reads import (
    ClsFeatures,
    ClsQuery,
    Crops,
    Projector,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)
from tokenprune.engine.interface.checked_model import bound_model_of

PROJECTED = ["llava", "llava_next"]


def tower_states(model, inputs):
    """Hidden states of the tower on its own, every crop a row."""
    pixels = inputs["pixel_values"]
    pixels = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    states, hooks = [], []
    for block in blocks_of(model):
        note = lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
        hooks.append(block.register_forward_hook(note))
    try:
        with torch.no_grad():
            tower_of(model)(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return states


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("layers", [-2, -1, [-3, -1]])
def test_cls_features_are_the_first_row_of_each_tokens_crop(name, layers):
    model, inputs = FAMILIES[name].build(), inputs_of(name)
    model.base_model.config.vision_feature_layer = layers
    if isinstance(layers, list):  # the projector is of one layer's width
        model.base_model.multi_modal_projector.linear_1 = torch.nn.Linear(32 * len(layers), 32)
    seen, _ = read(model, Reader(ClsFeatures(), TowerFeatures(), Crops(), Projector()), inputs)
    states = tower_states(model, inputs)
    wanted = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    rows = torch.cat(wanted, -1)[:, 0]
    exists = seen["exists"]
    assert torch.allclose(seen["cls_features"][exists], rows[seen["crops"][exists]], atol=1e-5)
    assert seen["cls_features"].shape == seen["features"].shape
    assert seen["project"](seen["cls_features"]).shape[:2] == exists.shape


def test_cls_features_of_the_layers_that_vipllava_selects():
    model, inputs = model_of("vipllava"), inputs_of("vipllava")
    assert list(model.config.vision_feature_layers) == [-2, 1]
    seen, _ = read(model, Reader(ClsFeatures(), Crops()), inputs)
    states, exists = tower_states(model, inputs), seen["exists"]
    rows = torch.cat((states[-2], states[0]), -1)[:, 0]
    assert torch.allclose(seen["cls_features"][exists], rows[seen["crops"][exists]], atol=1e-5)


@pytest.mark.parametrize("name", PROJECTED)
def test_crops_tell_where_a_token_was_seen(name):
    """The features of a crop are among the rows of the tower's output for it."""
    inputs = inputs_of(name)
    seen, _ = read(model_of(name), Reader(TowerFeatures(), Crops()), inputs)
    states = tower_states(model_of(name), inputs)[model_of(name).base_model.config.vision_feature_layer][:, 1:]
    for row in range(len(seen["exists"])):
        for token in seen["exists"][row].nonzero().flatten().tolist():
            rows = states[seen["crops"][row, token]]
            assert (rows - seen["features"][row, token]).abs().amax(1).min() < 1e-5


@pytest.mark.parametrize("name", WITH_CLS)
def test_queries_keys_and_values_are_the_projections(name):
    inputs, caught = inputs_of(name), {}
    attention = attention_of(blocks_of(model_of(name))[-1])
    hooks = [
        getattr(attention, part).register_forward_hook(lambda m, a, out, part=part: caught.update({part: out}))
        for part in ("q_proj", "k_proj", "v_proj")
    ]
    try:
        tower_states(model_of(name), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    seen, _ = read(model_of(name), Reader(ClsQuery(), TowerKeys(heads="mean"), TowerValues(), Crops()), inputs)
    exists, crops = seen["exists"], seen["crops"]
    assert torch.allclose(seen["cls_query"][exists], caught["q_proj"][crops[exists], 0].float(), atol=1e-5)
    if name in ("internvl", "qianfan_ocr"):  # four patches make a token
        assert seen["values"].shape[-1] == caught["v_proj"].shape[-1]
        return
    size = seen["keys"].shape[-1]
    keys = caught["k_proj"].unflatten(-1, (-1, size)).mean(-2)[:, 1:]
    for row, token in exists.nonzero().tolist():
        crop = crops[row, token]
        assert (keys[crop] - seen["keys"][row, token]).abs().amax(1).min() < 1e-5
        assert (caught["v_proj"][crop, 1:] - seen["values"][row, token]).abs().amax(1).min() < 1e-5


@pytest.mark.parametrize("name", ["llava", "llava_siglip", "llava_next", "internvl", "qwen2_5_vl"])
def test_who_offers_what(name):
    offered = bound_model_of(model_of(name)).offers()
    assert ({ClsQuery, Crops} <= offered) == (name in WITH_CLS)
    assert (ClsFeatures in offered) == (name in PROJECTED)
    assert {TowerValues, TowerStates} <= offered
