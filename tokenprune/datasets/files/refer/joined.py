"""Joins the two files of a REFER dataset, references and instances, into what each split asks: plain values of JSON.

`joined` gives the parts of an index (`tokenprune.datasets.files.index_cache`): "splits", the names, and for each of
them its scenes and what is wrong with its references:

    {"scenes": [{"id": 5, "file": "a.jpg", "size": [480, 640], "objects": [segmentation, …],
                 "queries": [["sent_id", "text", [numbers of objects]], …]}, …],
     "problems": [["refs without sentences", "ref 7", number of queries], …]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenprune.datasets.files.annotation_files import json_of, side
from tokenprune.datasets.files.refer.unpickler import read_pickle
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown, unicode_problem

SPLITS = ("train", "val", "test", "testA", "testB", "testC")  # the usual order; others follow
NO_TARGET = -1
Part = dict[str, Any]


def joined(refs_file: Path, instances_file: Path, several: bool) -> dict[str, Any]:
    """The parts of the index.

    Args:
        refs_file: pickled, or JSON if its name ends so.
        instances_file: images and annotations, as COCO's.
        several: whether a reference is to a list of annotations, of which crowds are left out; -1 or none at all
            stands for no target.

    Raises:
        InputError: a file is missing, damaged or of another form.
    """
    refs = _checked_refs(refs_file, several)
    images, annotations = _instances(instances_file)
    parts: dict[str, Part] = {}
    scenes: dict[tuple[str, Any], Part] = {}
    for ref in refs:
        for split in splits_of(ref["split"]):
            part = parts.setdefault(split, {"scenes": [], "problems": []})
            known = _Known(images, annotations, ref["image_id"])
            targets, problem = known.targets(ref["ann_id"]) if several else known.target(ref["ann_id"])
            name, sentences = f"ref {ref['ref_id']}", ref["sentences"]
            if problem or not sentences:
                part["problems"].append([problem or "refs without sentences", name, len(sentences)])
                continue
            scene = scenes.get((split, ref["image_id"]))
            if scene is None:
                scene = scenes[split, ref["image_id"]] = {**known.image, "objects": {}, "queries": []}
            numbers = [_number(scene["objects"], target) for target in targets]
            for sentence in sentences:
                text = sentence["sent"].lower().strip()
                if text:
                    scene["queries"].append([sentence["sent_id"], ref["ref_id"], text, numbers])
                else:
                    part["problems"].append(["empty sentences", f"sentence {sentence['sent_id']} of {name}", 1])
    for (split, _), scene in scenes.items():
        if scene["queries"]:
            scene["objects"] = [annotations[target].get("segmentation") or [] for target in scene["objects"]]
            parts[split]["scenes"].append(scene)
    for part in parts.values():
        _name_queries(part["scenes"])
    order = sorted(parts, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))
    return {"splits": order, **{f"split {split}": part for split, part in parts.items()}}


def splits_of(written: str) -> list[str]:
    """The splits that a reference is in: "testAB", in refclef, is a part of testA and of testB, and one of its own."""
    letters = written.removeprefix("test")
    if len(letters) > 1 and written.startswith("test") and letters.isupper() and letters.isalpha():
        return [*(f"test{letter}" for letter in letters), written]
    return [written]


class _Known:
    """What the instances have about the image and the annotations of a reference."""

    def __init__(self, images: dict[Any, Part], annotations: dict[Any, Part], image_id: Any) -> None:
        self._annotations, self._id = annotations, image_id
        self.image = images.get(image_id, {})

    def target(self, annotation: Any) -> tuple[list[Any], str]:
        """The annotation that is referred to, in a list, and what is wrong with it."""
        if not self.image:
            return [], "refs whose image is not in instances.json"
        if annotation not in self._annotations:
            return [], "refs whose annotation is not in instances.json"
        if self._annotations[annotation]["image_id"] != self._id:
            return [], "refs whose annotation belongs to another image"
        return [annotation], ""

    def targets(self, annotations: Any) -> tuple[list[Any], str]:
        """The annotations that are referred to, without crowds, and what is wrong with them."""
        wanted = list(dict.fromkeys(annotations))
        if not self.image or wanted in ([], [NO_TARGET]):
            return [], "" if self.image else self.target(None)[1]
        for annotation in wanted:
            problem = self.target(annotation)[1]
            if problem:
                return [], problem
        single = [annotation for annotation in wanted if not self._annotations[annotation].get("iscrowd")]
        return single, "" if single else "refs to crowds alone"


def _number(objects: dict[Any, int], target: Any) -> int:
    return objects.setdefault(target, len(objects))


def _name_queries(scenes: list[Part]) -> None:
    """Turn [sent_id, ref_id, text, numbers] into [id, text, numbers]; ids are unique in the split."""
    uses = Counter(str(query[0]) for scene in scenes for query in scene["queries"])
    for scene in scenes:
        scene["queries"] = [
            [str(sent) if uses[str(sent)] == 1 else f"{ref}-{sent}", text, numbers]
            for sent, ref, text, numbers in scene["queries"]
        ]


# reading and checking the files --------------------------------------------------------------------------------------


def _checked_refs(file: Path, several: bool) -> list[Part]:
    found = json_of(file) if file.suffix == ".json" else read_pickle(file)
    if not isinstance(found, list) or not found:
        raise InputError(f"{str(file)!r} holds {shown(found)}, expected a list of references; give an intact file")
    return [_ref(value, f"{str(file)!r}, reference {number}", several) for number, value in enumerate(found)]


def _ref(value: Any, where: str, several: bool) -> Part:
    ref = _fields(
        value, {"ref_id": (int, str), "image_id": (int, str), "split": str, "sentences": (list, tuple)}, where
    )
    if several and "ann_id" in value:
        found = value["ann_id"]
        ids = list(found) if isinstance(found, (list, tuple)) else [NO_TARGET if found is None else found]
        ref["ann_id"] = [_fields({"ann_id": one}, {"ann_id": (int, str)}, where)["ann_id"] for one in ids]
    else:
        ref |= _fields(value, {"ann_id": (int, str)}, where)
    ref["sentences"] = [_fields(one, {"sent_id": (int, str), "sent": str}, where) for one in ref["sentences"]]
    return ref


def _instances(file: Path) -> tuple[dict[Any, Part], dict[Any, Part]]:
    """Images and annotations by id."""
    found = json_of(file)
    images = _by_id(found, "images", {"id": (int, str), "file_name": str}, file)
    for identity, one in images.items():
        where = f"{str(file)!r}, image {identity!r}"
        size = [side(one, "height", where), side(one, "width", where)]
        images[identity] = {"id": identity, "file": one["file_name"], "size": size}
    return images, _by_id(found, "annotations", {"id": (int, str), "image_id": (int, str)}, file)


def _by_id(found: Any, key: str, fields: dict[str, Any], file: Path) -> dict[Any, Part]:
    known: dict[Any, Part] = {}
    taken: dict[str, Part] = {}
    for number, one in enumerate(_entries(found, key, fields, file)):
        if taken.setdefault(str(one["id"]), one) != one:  # the same entry twice is one
            where = f"{str(file)!r}, {key} {number}"
            raise InputError(f"{where} has the id {one['id']!r} of another entry; give an intact file of this dataset")
        known[one["id"]] = one
    return known


def _entries(found: Any, key: str, fields: dict[str, Any], file: Path) -> Iterator[Part]:
    values = found.get(key) if isinstance(found, dict) else None
    if not isinstance(values, list):
        raise InputError(f"{str(file)!r} has no list {key!r}; expected images and annotations in COCO's form")
    for number, value in enumerate(values):
        _fields(value, fields, f"{str(file)!r}, {key} {number}")
        yield value


def _fields(value: Any, fields: dict[str, Any], where: str) -> Part:
    """These fields of an object; raises InputError if one is absent, of another type, or text that is no Unicode."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {shown(value)}, expected an object with {', '.join(fields)}; give an intact file")
    for field, kinds in fields.items():
        if not isinstance(value.get(field), kinds) or isinstance(value[field], bool):
            held = f"is {shown(value[field])}" if field in value else "is missing"
            raise InputError(f"{where}: {field!r} {held}; give an intact file of this dataset")
        if isinstance(value[field], str) and (problem := unicode_problem(value[field])):
            raise InputError(f"{where}: {field!r} {value[field][:60]!a} {problem}")
    return {field: value[field] for field in fields}
