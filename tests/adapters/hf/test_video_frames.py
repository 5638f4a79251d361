"""Frames of videos: which ones of files, folders, lists and arrays are taken, and what the processor is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_videos import PlainVideos, clip, write_film

from tokenprune.errors import InputError, UnsupportedError
from tokenprune_adapters.hf.inputs.videos import MOST, VideoReader, is_video

pytest.importorskip("cv2", reason="video files are decoded with OpenCV")
RATE, TOTAL = 8.0, 24
VIDEO = clip(TOTAL)
TAKES_ALL = SimpleNamespace(do_sample_frames=False, fps=None)


def write(path: Path, frames: Any = VIDEO, rate: float = RATE) -> Path:
    return write_film(path, frames, rate)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("films") / "film.avi")


@pytest.mark.parametrize("whole", [str, Path])
@pytest.mark.parametrize(
    ("processor", "asked", "indices"),
    [
        (TAKES_ALL, {}, range(TOTAL)),
        (TAKES_ALL, {"frames": 1}, [0]),
        (TAKES_ALL, {"frames": 5}, [0, 4, 9, 14, 19]),
        (TAKES_ALL, {"frames": TOTAL}, range(TOTAL)),
        (TAKES_ALL, {"fps": 2}, [0, 4, 8, 12, 16, 20]),
        (TAKES_ALL, {"fps": 0.01}, [0]),
        (TAKES_ALL, {"fps": 8.0}, range(TOTAL)),
        (PlainVideos(True), {}, [0, 4, 8, 12, 16, 20]),  # which takes two per second by itself
        (PlainVideos(True), {"fps": 4}, range(0, TOTAL, 2)),
        (PlainVideos(True), {"frames": 3}, [0, 8, 16]),
    ],
)
def test_frames_of_a_file(film: Path, processor: Any, asked: dict[str, Any], indices: Any, whole: Any) -> None:
    found = VideoReader(processor, **asked).read(whole(film))
    assert np.array_equal(found.pixels, VIDEO[[*indices]])
    assert list(found.metadata.frames_indices) == [*indices]
    assert (found.metadata.total_num_frames, found.metadata.fps, found.metadata.duration) == (TOTAL, RATE, 3.0)
    assert found.rate == pytest.approx(len(indices) / 3.0)
    assert found.size == f"{len(indices)} frames of 32×24"


def test_a_frame_that_is_chosen_twice(film: Path) -> None:
    """As by GLM's processors, where they choose an odd number."""
    chosen = [0, 5, 9, 9]
    processor = PlainVideos(True)
    processor.sample_frames = lambda metadata, **_: np.array(chosen)  # type: ignore[method-assign]
    found = VideoReader(processor).read(film)
    assert np.array_equal(found.pixels, VIDEO[chosen])
    assert found.metadata.frames_indices == chosen


def test_frames_that_are_given(tmp_path: Path) -> None:
    for place, frame in enumerate(VIDEO):  # 2 before 10, whatever the order of letters
        Image.fromarray(frame).save(tmp_path / f"frame{place}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    floats = torch.from_numpy(VIDEO).double() / 255
    forms: list[Any] = [VIDEO, torch.from_numpy(VIDEO), floats, tmp_path, str(tmp_path), [*VIDEO]]
    forms += [[Image.fromarray(frame) for frame in VIDEO], tuple(Image.fromarray(frame) for frame in VIDEO)]
    for form in forms:
        assert is_video(form)
        found = VideoReader(TAKES_ALL).read(form)
        assert np.array_equal(found.pixels, VIDEO)
        assert found.metadata.fps is None
        assert found.rate is None
        fewer = VideoReader(PlainVideos(True), frames=3).read(form)
        assert np.array_equal(fewer.pixels, VIDEO[[0, 8, 16]])
        assert fewer.metadata.frames_indices == [0, 8, 16]
        assert fewer.metadata.fps == 2
        rated = VideoReader(PlainVideos(True), fps=4).read(form)
        assert np.array_equal(rated.pixels, VIDEO)
        assert (rated.metadata.fps, rated.metadata.duration, rated.rate) == (4, 6.0, 4.0)


def test_several_videos_are_a_list() -> None:
    assert not is_video([VIDEO, VIDEO])
    assert not is_video(["a.mp4", "b.mp4"])
    assert not is_video([])
    assert not is_video([[Image.fromarray(VIDEO[0])], VIDEO])


def test_a_video_is_read_once(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, path = VideoReader(TAKES_ALL, frames=2), str(film)
    first = reader.read(path)
    monkeypatch.setattr(reader, "_read", lambda video: pytest.fail("read a second time"))
    assert reader.read(path) is first


@pytest.mark.parametrize(
    ("make", "asked", "message"),
    [
        (lambda folder: folder / "none.mp4", {}, r"video '.*none\.mp4': no such file; check the path"),
        (lambda folder: "", {}, "video='' found, expected the path of a file or folder"),
        (lambda folder: "a" * 5000, {}, r"video 'a+' cannot be read \(.*\); choose another"),
        (lambda folder: "https://example.org/a.mp4", {}, "is a URL, which is not fetched"),
        (lambda folder: write(folder / "a.avi"), {"frames": 25}, r"a\.avi' has 24 frames, frames=25 requested"),
        (
            lambda folder: write(folder / "a.avi"),
            {"fps": 9},
            r"has 8\.0 frames per second, fps=9 requested; request fewer",
        ),
        (lambda folder: _text(folder / "a.mp4"), {}, r"a\.mp4' cannot be decoded by OpenCV; convert it to MP4"),
        (lambda folder: _cut(write(folder / "a.avi")), {}, r"a\.avi': \d+ of the 24 chosen frames can be decoded"),
        (lambda folder: _picture(folder / "a.png"), {}, r"a\.png' is a picture; pass it as image="),
        (lambda folder: folder, {}, r"folder '.*' has no frames"),
        (lambda folder: [Image.new("RGB", (4, 4)), Image.new("RGB", (6, 4))], {}, "frames of 4×4 and 6×4 pixels"),
        (lambda folder: VIDEO[:0], {}, "an array of frames has no frames"),
        (lambda folder: VIDEO.transpose(0, 3, 1, 2), {}, r"shape \[3, 24, 32\].* put the channels last"),
        (lambda folder: VIDEO[None], {}, r"video of shape \[1, 24, 24, 32, 3\] found, expected"),
        (lambda folder: VIDEO.astype(np.float32), {}, "expected 0…1; divide it"),
        (
            lambda folder: write(folder / "a.avi", clip(MOST + 1, 8, 8)),
            {},
            "has 769 frames, .* takes them all; pass fra",
        ),
    ],
)
def test_what_is_refused(make: Any, asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        VideoReader(TAKES_ALL, **asked).read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_sampling_that_fails(film: Path) -> None:
    """What a processor says of it is in the message."""
    processor = PlainVideos(True)

    def fails(**_: Any) -> None:
        raise ValueError("too few\nframes")

    processor.sample_frames = fails  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"film\.avi' cannot be read \(ValueError: too few frames\)"):
        VideoReader(processor).read(film)


def test_without_opencv(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedError, match=r"cv2, which is not installed; .*pip install \"tokenprune-vlm\[video\]\""
    ):
        VideoReader(TAKES_ALL).read(film)
    assert len(VideoReader(TAKES_ALL).read(VIDEO).pixels) == TOTAL


def _text(path: Path) -> Path:
    path.write_text("no video")
    return path


def _cut(path: Path) -> Path:
    """A file whose end is missing."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _picture(path: Path) -> Path:
    Image.fromarray(VIDEO[0]).save(path)
    return path
