"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.cli.checks import check_image, check_model
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.report.files import check_targets, write_mask
from tokenprune.utils.files import new_folder, replacing, write_first
from tokenprune.utils.images import to_rgb


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with replacing(tmp_path / "new.txt") as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path  # a rename within a folder is atomic
        assert not (tmp_path / "new.txt").exists()
    assert (tmp_path / "new.txt").read_text() == "whole"
    assert (tmp_path / "new.txt").stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.txt", "plain"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_as_it_was(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "old.txt"
    target.write_text("old")
    expected = InputError if isinstance(error, OSError) else type(error)

    def write() -> None:
        with replacing(target) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(expected):
        write()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_what_is_replaced_keeps_its_permissions_and_links_are_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "x.txt", tmp_path / "file" / "x.txt"):
        with pytest.raises(InputError, match=r"x\.txt' cannot be written"), replacing(path) as temporary:
            temporary.write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_leaves_the_old_mask(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the write in the middle."""
    write_mask(np.zeros((4, 4), dtype=bool), tmp_path / "mask.png")
    before = (tmp_path / "mask.png").read_bytes()
    code = """
import resource, signal, sys
import numpy as np
from tokenprune.errors import InputError
from tokenprune.report.files import write_mask
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_mask(np.random.default_rng(0).random((200, 200)) > 0.5, sys.argv[1])
except InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "mask.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mask.png' cannot be written (File too large)" in done.stdout
    assert (tmp_path / "mask.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_one_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:  # as on a file system without hard links, where two at the very same time are not told apart

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    target, start, first = tmp_path / "one.txt", threading.Barrier(8), []

    def write(number: int) -> None:
        if links:
            start.wait()
        if write_first(target, f"{number} " * 10_000):
            first.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
        if not links:
            writer.join()
    for writer in writers:
        writer.join()
    (winner,) = first
    assert target.read_text() == f"{winner} " * 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "package", "make room") as unfinished:
            (unfinished / "a.txt").write_text("")
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); make room"):
        fill()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "package", "") as unfinished:
        (unfinished / "a.txt").write_text("")
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "of-another.txt").write_text("")
        with pytest.raises(InputError, match="cannot be written"), new_folder(tmp_path / "package", "") as second:
            (second / "b.txt").write_text("")
        (tmp_path / "package" / "of-another.txt").unlink()
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


@pytest.mark.parametrize("second", ["mask.png", "sub/../mask.png", "link/mask.png", "hard.png"])
def test_two_outputs_that_are_one_file_are_refused(tmp_path: Path, second: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    mask = tmp_path / "mask.png"
    if second == "hard.png":
        Image.new("L", (2, 2)).save(mask)
        os.link(mask, tmp_path / second)
    with pytest.raises(InputError, match=r"--overlay .* is the same file as --out"):
        check_targets({"--out": mask, "--overlay": tmp_path / second})
    with pytest.raises(InputError, match=r"--out .* is the same file as the image that is read"):
        check_targets({"--out": tmp_path / second}, inputs=[mask])
    check_targets({"--out": mask, "--overlay": tmp_path / "other.png"}, inputs=[tmp_path / "photo.png"])


def test_an_output_that_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        check_targets({"--out": tmp_path / "pipe.png"})


NOBODY = "~nobody-at-all/a.png"


@pytest.mark.parametrize(
    "use",
    [
        lambda: tp.load("~nobody-at-all/model"),
        lambda: tp.load("lisa-tiny", vision_tower="~nobody-at-all/tower"),
        lambda: to_rgb(NOBODY),
        lambda: check_image(Path(NOBODY)),
        lambda: check_model("lisa-tiny", vision_tower=Path("~nobody-at-all/tower")),
        lambda: check_targets({"--out": Path(NOBODY)}),
        lambda: write_mask(np.zeros((2, 2), dtype=bool), Path(NOBODY)),
    ],
    ids=["load", "tower", "to_rgb", "check_image", "check_model", "check_targets", "write_mask"],
)
def test_the_home_folder_of_nobody_is_a_path_that_is_not_there(use: Callable[[], object]) -> None:
    with pytest.raises(TokenPruneError, match="~nobody-at-all"):
        use()


def test_home_folders_are_meant_wherever_a_picture_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mask(np.array([[True, False]]), Path("~/m.png"))
    assert (tmp_path / "m.png").is_file()
    check_image(Path("~/m.png"))
    assert np.asarray(to_rgb("~/m.png")).tolist() == [[[255] * 3, [0] * 3]]
