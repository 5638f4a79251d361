"""Indexes of annotation files on disk: read where they match, made anew where they do not, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenprune.datasets.files.index_cache import Index, cache_folder
from tokenprune.errors import InputError

PARTS = {"splits": ["train", "val"], "split val": {"a": [1, 2.5, None, "ä\ud800"]}, "../../x\n": [float("inf")]}


class Built:
    """What an index is made of, counted."""

    def __init__(self, source: Path) -> None:
        self.source, self.times, self.parts = source, 0, dict(PARTS)

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return self.parts

    def index(self, kind: str = "kind-1") -> Index:
        return Index(kind, [self.source], self)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(tmp_path: Path, cache: Path) -> Built:
    (tmp_path / "source.json").write_text("content")
    return Built(tmp_path / "source.json")


def stored(cache: Path) -> Path:
    (file,) = (cache / "index").iterdir()
    return file


def test_it_is_built_once(built: Built, cache: Path) -> None:
    for _ in range(3):
        index = built.index()
        for name, part in PARTS.items():
            assert index.part(name) == part
    assert built.times == 1
    assert stored(cache).is_file()
    first, second = built.index().part("split val"), built.index().part("split val")
    assert first is not second


def test_only_what_is_asked_is_read(built: Built, cache: Path) -> None:
    built.index().part("splits")
    file = stored(cache)
    head, first, *rest = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([head, first, *(b"x" * len(line) for line in rest)]))
    assert built.index().part("splits") == PARTS["splits"]
    assert built.times == 1
    assert built.index().part("split val") == PARTS["split val"]  # its part is damaged
    assert built.times == 2
    assert built.index().part("split val") == PARTS["split val"]  # and was written anew
    assert built.times == 2


def test_parts_that_are_not_there(built: Built) -> None:
    for _ in range(2):
        with pytest.raises(KeyError):
            built.index().part("split test")


@pytest.mark.parametrize("change", ["size", "time", "path", "kind"])
def test_a_change_is_noticed(built: Built, change: str) -> None:
    built.index().part("splits")
    kind = "kind-1"
    before = built.source.stat()
    if change == "size":
        built.source.write_text("content!")
        os.utime(built.source, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        os.utime(built.source, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    elif change == "path":
        built.source = built.source.rename(built.source.with_name("other.json"))
    else:
        kind = "kind-2"
    built.parts = {"splits": ["new"]}
    for _ in range(2):
        assert built.index(kind).part("splits") == ["new"]
    assert built.times == 2


def test_only_the_newest_of_the_same_files_is_kept(built: Built, cache: Path) -> None:
    for size in range(3):
        built.source.write_text("x" * size)
        built.index().part("splits")
    assert stored(cache).is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff\xfe\x00"),
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(file.read_bytes()[:40]),
        lambda file: file.write_bytes(file.read_bytes().replace(b"train", b"troin")),
        lambda file: file.write_bytes(b'{"made_from": null}\n'),
        lambda file: file.write_bytes(b"[]\n"),
        lambda file: file.write_bytes(b"5\n"),
        lambda file: file.write_bytes(b"[" * 100000),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_one_is_made_anew(built: Built, cache: Path, damage: Callable[[Path], object]) -> None:
    built.index().part("splits")
    file = stored(cache)
    damage(file)
    for _ in range(2 if file.is_file() else 1):
        for name, part in PARTS.items():
            assert built.index().part(name) == part
    assert built.times == (2 if file.is_file() else 1 + len(PARTS))


@pytest.mark.parametrize("place", ["a file", "read-only", "too long"])
def test_where_nothing_can_be_written(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "a file":
        (tmp_path / "cache").write_text("")
    elif place == "read-only":
        monkeypatch.setenv("TOKENPRUNE_CACHE", "/proc/nowhere")
    else:
        monkeypatch.setenv("TOKENPRUNE_CACHE", f"/tmp/{'x' * 5000}")
    for times in (1, 2):
        assert built.index().part("split val") == PARTS["split val"]
        assert built.times == times


def test_errors_of_the_files_are_told(built: Built, cache: Path) -> None:
    def damaged() -> dict[str, Any]:
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        Index("kind-1", [built.source], damaged).part("splits")
    assert not cache.exists()
    built.source.unlink()
    with pytest.raises(InputError, match=r"source.json': no such file; check the path"):
        built.index()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("TOKENPRUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "tokenprune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "tokenprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tokenprune"
    monkeypatch.setenv("TOKENPRUNE_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("TOKENPRUNE_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "tokenprune"
