"""The cache of encoded images: found by content, never after the towers changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.errors import OptionError
from tokenprune_adapters.segmentation import image_cache
from tokenprune_adapters.segmentation.image_cache import ImageCache


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).eval()


class Counted:
    def __init__(self, tower, size=2):
        self.tower, self.cache, self.runs = tower, ImageCache(size), 0

    def __call__(self, image):
        return self.cache.encoded(image, [self.tower], self.encode)

    def encode(self, image):
        self.runs += 1
        pixels = torch.from_numpy(np.asarray(image).copy()).float().reshape(-1, 3)
        with torch.no_grad():
            return self.tower.to(pixels)(pixels)


def picture(value, size=(4, 3)):
    return Image.new("RGB", size, (value, 0, 0))


def test_equal_pictures_are_encoded_once_and_the_oldest_is_forgotten(tower):
    run = Counted(tower)
    assert torch.equal(run(picture(1)), run(picture(1)))
    assert run.runs == 1
    run(picture(2)), run(picture(1)), run(picture(3))  # forgets 2
    assert (run.runs, len(run.cache)) == (3, 2)
    run(picture(1))
    assert run.runs == 3
    run(picture(2))
    assert run.runs == 4
    run(picture(1, (3, 4)))  # the same bytes in another shape
    assert run.runs == 5


def write_in_place(tower):
    with torch.no_grad():
        tower[0].weight[1, 0] += 1


def write_data(tower):
    tower[0].weight.data += 1


def load(tower):
    tower.load_state_dict({name: value + 1 for name, value in tower.state_dict().items()})


def replace_module(tower):
    tower[2] = torch.nn.Linear(4, 2).eval()


def replace_buffer(tower):
    tower[1].running_mean = torch.ones(4)


def other_type(tower):
    tower.double()


def wrap(tower):
    original = tower[0].forward
    tower[0].forward = lambda x: original(x) + 1


@pytest.mark.parametrize("change", [write_in_place, write_data, load, replace_module, replace_buffer, other_type, wrap])
def test_changed_towers_run_again(tower, change):
    run = Counted(tower)
    before = run(picture(5))
    change(tower)
    after = run(picture(5))
    assert run.runs == 2
    assert change is other_type or not torch.equal(before, after)


@pytest.mark.parametrize("always", ["training", "hook", "off"])
def test_towers_that_must_run_each_time(tower, always):
    run, calls = Counted(tower, 0 if always == "off" else 2), []
    if always == "training":
        tower.train()
    if always == "hook":
        tower[0].register_forward_hook(lambda *given: calls.append(given))
    run(picture(5)), run(picture(5))
    assert run.runs == 2
    assert len(calls) == (2 if always == "hook" else 0)


def test_sizes():
    cache = ImageCache(3)
    for value in range(5):
        cache.encoded(picture(value), [], lambda image: image)
    assert len(cache) == 3
    cache.size = 1
    assert repr(cache) == "ImageCache(1 of 1 images)"
    assert len(copy.deepcopy(cache)) == 0
    cache.clear()
    assert len(cache) == 0
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(OptionError, match="expected a whole number of images"):
            cache.size = wrong


def test_a_cache_that_is_off_looks_at_nothing(tower, monkeypatch):
    looked = []
    monkeypatch.setattr(image_cache, "_state", lambda modules: looked.append(modules))
    run = Counted(tower, size=0)
    run(picture(1)), run(picture(1))
    assert (run.runs, looked) == (2, [])


def test_segment_gives_the_same_masks_from_the_cache(tmp_path, monkeypatch):
    model, runs = tp.load("lisa-tiny"), []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda image: runs.append(1) or encode(image))
    scene = next(iter(tp.dataset("shapes").scenes("val")))
    Image.fromarray(np.asarray(scene.image)).save(tmp_path / "a.png")
    first = model.segment(scene.image, scene.queries[0].text)
    for image in (scene.image, tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        again = model.segment(image, scene.queries[0].text, tp.strategy("none"))
        assert torch.equal(again.mask_logits, first.mask_logits)
    assert len(runs) == 1
    model.segment(model.encode_image(scene.image), scene.queries[0].text)
    assert len(model.image_cache) == 1
