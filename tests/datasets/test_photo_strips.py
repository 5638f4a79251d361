"""Strips of photographs: queries true for one person, splits and seeds, and folders that are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strip_files
from PIL import Image
from scipy.io import savemat

import tokenprune as tp
from tokenprune.datasets.base import Scene
from tokenprune.datasets.inspection import inspected
from tokenprune.datasets.strips import photographs, queries
from tokenprune.datasets.strips.colours import COLOURS, colour_shares
from tokenprune.datasets.strips.photographs import GARMENTS, HEIGHT, NAMES, SPLITS, WIDTH, Photographs, View
from tokenprune.datasets.strips.strip import Strips
from tokenprune.errors import InputError, OptionError, TokenPruneError, UnknownNameError
from tokenprune.testing.dataset_conformance import DatasetConformance


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strip_files.write(tmp_path_factory.mktemp("ccp") / "small")


class TestConformance(DatasetConformance):
    @pytest.fixture(autouse=True)
    def _written(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "dataset", f"photo-strips:{folder}")


NAMED = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(NAMES)})\b")
NEGATED = re.compile(r"\b(without|no|not|lacks)\b")


def is_true(text: str, worn: dict[str, str]) -> bool:
    """Whether a query is true for somebody, by rules of this file."""
    (*rest, (colour, garment)) = NAMED.findall(text)
    if NEGATED.search(text):
        assert not rest
        assert not colour
        return garment not in worn
    return all(name in worn and tone in ("", worn[name]) for tone, name in [*rest, (colour, garment)])


@pytest.mark.parametrize("split", SPLITS)
def test_a_query_is_true_for_exactly_one_person(folder: Path, split: str) -> None:
    """The wardrobes are known; the mask is that person's, in the size of the strip."""
    kinds = set()
    for scene in tp.dataset(f"photo-strips:{folder}").scenes(split, limit=120):
        persons = strip_files.shown(scene.image)
        assert scene.image.shape == (HEIGHT, 4 * WIDTH, 3)
        assert len({query.text for query in scene.queries}) == len(scene.queries)
        for query in scene.queries:
            right = [is_true(query.text, strip_files.wardrobe(person)) for person in persons]
            assert right.count(True) == 1, query.text
            expected = np.zeros((HEIGHT, 4, WIDTH), dtype=bool)
            labels = strip_files.picture(persons[right.index(True)])[1]
            expected[:, right.index(True)] = np.kron(labels > 0, np.ones((4, 4), dtype=bool))
            assert np.array_equal(query.mask, expected.reshape(HEIGHT, 4 * WIDTH))
            assert query.is_sentence == (re.match(r"the |somebody|an? |\w+( \w+)?( and .*)?$", query.text) is None)
            assert split != "train" or not query.id.endswith("unseen")
            kinds.add(query.kind)
    assert kinds == set(queries.KINDS)


def test_queries_about_real_photographs(shared_data: Callable[[str], Path]) -> None:
    """By the files of labels, and by what the frame shows."""
    root = shared_data("ccp")
    names = json.loads((root / "labels.json").read_text())
    strips = Strips(Photographs(root, "test"))
    for number in range(6):
        strip = strips.draw(np.random.default_rng([22, number]), 8)
        wear = []
        for view in strip.views:
            labels = np.array(Image.open(root / "labels" / f"{view.number:04d}.png"))
            wear.append({name: np.isin(labels, [names.index(one) for one in GARMENTS[name]]).any() for name in NAMES})
        for query in strip.queries:
            named = [name for _, name in NAMED.findall(query.text)]
            negated = query.kind == "without"
            assert negated or all(wear[query.person][name] for name in named)
            if query.kind in ("garment", "without"):  # the frame may cut off what is worn
                seen = [(view.labels == 1 + NAMES.index(named[0])).any() for view in strip.views]
                assert [place for place in range(4) if seen[place] != negated] == [query.person]
            assert strip.person(query.person).sum() == (strip.views[query.person].labels > 0).sum()


def test_splits_are_disjoint(folder: Path) -> None:
    numbers = {split: Photographs(folder, split).numbers for split in SPLITS}
    assert {split: len(found) for split, found in numbers.items()} == {"train": 724, "val": 80, "test": 200}
    assert sorted(number for found in numbers.values() for number in found) == list(range(1, 1005))
    assert numbers["test"][:3] == [295, 507, 2]  # those that photo-small was tested on


def same(one: Scene, two: Scene) -> bool:
    texts = [[(query.id, query.text) for query in scene.queries] for scene in (one, two)]
    return texts[0] == texts[1] and np.array_equal(one.image, two.image)


def test_a_seed_fixes_the_scenes(folder: Path) -> None:
    data = tp.dataset(f"photo-strips:{folder}")
    first, again = (list(data.scenes("val", limit=9, seed=3)) for _ in range(2))
    assert [len(scene.queries) for scene in first] == [4, 4, 1]
    assert all(map(same, first, again))
    assert not any(map(same, first, data.scenes("val", limit=9)))
    assert not any(map(same, first, data.scenes("test", limit=9, seed=3)))


def test_scenes_are_those_that_photo_small_is_evaluated_on(folder: Path) -> None:
    for split, code in (("test", 22), ("val", 21)):
        scenes = tp.dataset(f"photo-strips:{folder}").scenes(split)
        for number in range(4):
            strip = Strips(Photographs(folder, split)).draw(np.random.default_rng([code, number]), 4)
            scene = next(scenes)
            assert np.array_equal(scene.image, strip.pixels)
            assert [query.text for query in scene.queries] == [query.text for query in strip.queries]
            assert [query.id.endswith("unseen") for query in scene.queries] == [one.unseen for one in strip.queries]


def test_options(folder: Path) -> None:
    scene = next(tp.dataset(f"photo-strips:{folder},persons=3,queries=2").scenes("val"))
    assert scene.image.shape == (HEIGHT, 3 * WIDTH, 3)
    assert len(scene.queries) == 2
    place = f"photo-strips:{folder},persons=3"
    assert tp.dataset(place).place == place  # type: ignore[attr-defined]


def test_colours_are_kept_in_the_cache_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    before = sorted(folder.rglob("*"))
    found = Photographs(folder, "val").colours
    for number, colours in found.items():
        expected = strip_files.wardrobe(number % strip_files.PERSONS)
        assert {name: max(shares, key=shares.__getitem__) for name, shares in colours.items()} == expected
    assert sorted(folder.rglob("*")) == before
    monkeypatch.setattr(photographs, "colour_shares", lambda pixels: pytest.fail("computed again"))
    assert Photographs(folder, "val").colours == found


def test_data_check(folder: Path) -> None:
    found = inspected(tp.dataset(f"photo-strips:{folder}"), "val", limit=20)
    assert (found.queries, found.scenes, found.problems) == (20, 5, [])


def removed(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def labels_of(*shape: int, value: int = 1) -> Callable[[Path], None]:
    """All labels of these, so that whatever is drawn first meets one."""

    def change(root: Path) -> None:
        for file in (root / "labels").iterdir():
            Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(file)

    return change


def written(text: str) -> Callable[[Path], Any]:
    return lambda root: (root / "labels.json").write_text(text)


def no_pictures(root: Path) -> None:
    for file in (root / "photos").iterdir():
        file.write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed("labels.json"), "no labels.json is in '.*', expected a folder with photos, labels and labels.json"),
        (written("{}"), "labels.json' is {}, expected a list of names"),
        (written("[1]"), r"labels.json' is \[1\], expected a list of names"),
        (written("[x"), "labels.json', line 1: not JSON"),
        (written('["null", "skin"]'), "labels.json' has no label 'bag', expected the 59 names"),
        (removed("labels/0017.png"), "labels' lacks '0017.png', expected 0001.png … 1004.png, 1004 files"),
        (removed("photos/0017.jpg"), "photos' lacks '0017.jpg'"),
        (lambda root: (root / "photos" / "1005.jpg").touch(), "photos' has '1005.jpg' too, expected 0001.jpg …"),
        (labels_of(80, 50), r"labels/\d+.png' is 50×80, expected 56×80, the size of its photograph"),
        (labels_of(80, 56, value=99), r"labels/\d+.png' has the label 99, expected numbers of the \d+ names"),
        (labels_of(80, 56, 3), r"labels/\d+.png' is of mode 'RGB', expected a number a pixel"),
        (labels_of(80, 56, value=0), "nothing tells the persons of 30 strips of split 'val' apart"),
        (no_pictures, r"image '.*photos/\d+.jpg' is not an image"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    root = strip_files.write(tmp_path / "ccp")
    change(root)
    with pytest.raises(InputError, match=message) as refused:
        next(tp.dataset(f"photo-strips:{root}").scenes("val"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("", OptionError, "is read from files: give their place, as in photo-strips:/data/photo-strips"),
        (":/no/such", InputError, "nothing is at '/no/such'; check the path; expected a folder with photos"),
        (":{},person=3", OptionError, "did you mean 'persons'"),
        (":{},persons=1", OptionError, "persons"),
        (":{},missing=skip", OptionError, "missing"),
    ],
)
def test_mistakes(folder: Path, place: str, error: type[TokenPruneError], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        tp.dataset(f"photo-strips{place.format(folder)}")
    assert "\n" not in str(refused.value)


def test_splits_and_limits_that_are_refused(folder: Path) -> None:
    data = tp.dataset(f"photo-strips:{folder}")
    with pytest.raises(UnknownNameError, match="did you mean 'test'"):
        next(data.scenes("tests"))
    with pytest.raises(OptionError, match="at most 20000 queries"):
        next(data.scenes("test", limit=20_001))


def person(number: int, *garments: tuple[str, str, int]) -> View:
    """A view with squares of garments: (name, colour, pixels a side)."""
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[20:300, 60:160] = 255
    for place, (name, _, side) in enumerate(garments):
        top = 30 + 60 * place
        labels[top : top + side, 80 : 80 + side] = NAMES.index(name) + 1
    colours = {name: {colour: 0.9} for name, colour, _ in garments}
    return View(number, np.zeros((HEIGHT, WIDTH, 3), np.uint8), labels, colours)


def test_what_is_hardly_seen_is_not_asked_for() -> None:
    """Read off the four persons by hand."""
    views = [
        person(0, ("dress", "red", 50), ("bag", "black", 30)),
        person(1, ("dress", "blue", 50), ("hat", "black", 30)),
        person(2, ("jeans", "blue", 50), ("bag", "brown", 30)),
        person(3, ("jeans", "blue", 50), ("bag", "black", 5)),  # hardly to be seen: nobody can say
    ]
    found = queries.all_queries(views, unseen_pairs=True)
    asked: dict[str, set[Any]] = {kind: {(text, who) for text, who, *_ in one} for kind, one in found.items()}
    assert asked["garment"] == {("a hat", 1)}
    assert asked["colour"] == {("a red dress", 0), ("a blue dress", 1), ("a black hat", 1)}
    assert not [text for text, _ in asked["without"] if "bag" in text]
    assert asked["two"] >= {("a blue dress and a hat", 1), ("a red dress and a bag", 0)}
    assert not [text for text, _ in asked["two"] if "jeans" in text and "blue" in text and "bag" not in text]


def test_pairs_that_are_kept_out_are_never_trained() -> None:
    kept = [(colour, name) for colour in COLOURS for name in NAMES if queries.kept_out(colour, name)]
    assert 0.1 < len(kept) / len(COLOURS) / len(NAMES) < 0.25
    colour, name = kept[0]
    others = [person(number, ("romper" if name != "romper" else "dress", "beige", 50)) for number in range(3)]
    strip = [person(9, (name, colour, 50)), *others]
    asked = {test: {text for text, *_ in queries.all_queries(strip, test)["colour"]} for test in (False, True)}
    phrase = queries.phrase(name, colour)
    assert phrase in asked[True]
    assert phrase not in asked[False]
    assert not set(queries.WORDINGS) & set(queries.UNSEEN_WORDINGS)


def test_colour_words() -> None:
    shares = colour_shares(np.array([[200, 30, 30]] * 3 + [[10, 10, 10]], dtype=np.uint8))
    assert shares["red"] == 0.75
    assert shares["black"] == 0.25


def test_a_flipped_and_cut_photograph_keeps_its_labels(folder: Path) -> None:
    """Wherever a garment lands, it has its colour."""
    found = Photographs(folder, "val")
    number = next(one for one in found.numbers if "dress" in strip_files.wardrobe(one % strip_files.PERSONS))
    colour = strip_files.wardrobe(number % strip_files.PERSONS)["dress"]
    places = set()
    for seed in range(6):
        view = found.view(number, np.random.default_rng(seed))
        dress = view.labels == 1 + NAMES.index("dress")
        distances = [np.abs(view.pixels[dress] - np.array(one)).sum(-1) for one in strip_files.COLOURS.values()]
        assert (np.argmin(distances, 0) == list(strip_files.COLOURS).index(colour)).mean() > 0.85
        assert view.wears("dress")
        assert view.colour_of("dress") == colour
        places.add(int(np.nonzero(dress.any(0))[0].mean()))
    assert len(places) == 6


def test_the_authors_repository_is_prepared(tmp_path: Path) -> None:
    clone, made = tmp_path / "clone", tmp_path / "made"
    (clone / "photos").mkdir(parents=True)
    (clone / "annotations" / "pixel-level").mkdir(parents=True)
    labels = np.zeros((832, 550), dtype=np.uint8)
    labels[416:] = 7
    savemat(clone / "annotations" / "pixel-level" / "0001.mat", {"groundtruth": labels})
    savemat(clone / "label_list.mat", {"label_list": np.array([["null", "hair"]], dtype=object)})
    for number in (1, 1005):  # the second has no labels for pixels
        Image.fromarray(np.where(labels == 7, 200, 20).astype(np.uint8)).save(clone / "photos" / f"{number:04d}.jpg")
    tool = Path(__file__).parents[2] / "tools" / "prepare_clothing.py"
    subprocess.run([sys.executable, str(tool), str(clone), str(made)], check=True, timeout=120)
    assert json.loads((made / "labels.json").read_text()) == ["null", "hair"]
    assert [file.name for file in (made / "photos").iterdir()] == ["0001.jpg"]
    photo, found = (np.array(Image.open(made / name)) for name in ("photos/0001.jpg", "labels/0001.png"))
    assert photo.shape == (384, 254, 3)
    assert np.array_equal(found, np.repeat([0, 7], 192)[:, None] * np.ones((1, 254), dtype=int))
    assert np.array_equal(photo[[10, -10]].mean((1, 2)).round(-1), [20, 200])
