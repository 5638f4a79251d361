"""`tokenprune answer` through its entry point."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import Runner, assert_one_line, run
from PIL import Image
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT
from vlm_videos import clip, load_video_vlm

import tokenprune as tp
from tokenprune.utils import threads
from tokenprune_adapters.hf.model import Answer

__all__ = ["run"]
pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
FASTV = ("--strategy", "fastv", "--budget", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint."""
    return write_vlm(tmp_path_factory.mktemp("vlm") / "llava", "llava")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of two pictures."""
    (tmp_path / "album").mkdir()
    for seed, name in enumerate(("first", "second")):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "album" / f"{name}.png")
    return tmp_path / "album"


def test_the_answer_is_that_of_python(run: Runner, folder: Path, album: Path) -> None:
    image = album / "first.png"
    ran = run("answer", image, "What is it?", "--model", folder, *FASTV, "--max-new-tokens", 6)
    assert ran.code == 0, ran.err
    said = tp.load(folder).answer(image, "What is it?", tp.strategy("fastv", budget=0.5), max_new_tokens=6)
    assert ran.out == said.text + "\n"
    tokens, times = ran.err.strip().splitlines()[-2:]
    assert tokens == f"fastv at 0.5: {said.trace.summary()}"
    assert re.fullmatch(r"time: preprocess [\d.]+ m?s, generation [\d.]+ m?s; [\d.]+ m?s in all", times)


def test_a_folder_of_images(run: Runner, folder: Path, album: Path) -> None:
    (album / "third.png").write_text("no picture")
    ran = run("answer", album, "What is it?", "--model", folder, "--max-new-tokens", 6)
    assert ran.code == 1
    model = tp.load(folder)
    paths = (album / "first.png", album / "second.png")
    said = [model.answer(path, "What is it?", max_new_tokens=6).text for path in paths]
    assert any("\n" in text for text in said)  # whose further lines are set in
    indented = ["\n    ".join(text.splitlines()) for text in said]
    assert ran.out == "".join(f"{path}: {text}\n" for path, text in zip(paths, indented, strict=True))
    assert [line.split(":")[0] for line in ran.out.splitlines() if not line.startswith("    ")] == [*map(str, paths)]
    *_, times, count, _ = ran.err.splitlines()
    assert re.fullmatch(r"time: preprocess [\d.]+ m?s, generation [\d.]+ m?s; [\d.]+ m?s in all", times)
    assert re.fullmatch(r"2 of 3 answers in [\d.]+ s, [\d.]+ images/s", count)
    problems = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(problems) == 2
    assert "third.png" in problems[0]
    assert problems[1] == "error: 1 of 3 images could not be used"


def test_threads(run: Runner, folder: Path, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(threads, "choose", lambda count: asked.append(count) or threads.ThreadChoice(1, "test"))
    before = torch.get_num_threads()
    ran = run("answer", album / "first.png", "What?", "--model", folder, "--threads", 1, "--max-new-tokens", 1)
    assert ran.code == 0, ran.err
    assert asked == [1]
    assert torch.get_num_threads() == before


def test_beams(run: Runner, folder: Path, album: Path) -> None:
    image, model, fastv = album / "first.png", tp.load(folder), tp.strategy("fastv", budget=0.5)
    for question in ("Where?", "Why?", "What is it?", "Who?"):
        greedy, beams = (model.answer(image, question, fastv, 6, num_beams=count) for count in (1, 3))
        if greedy.text != beams.text:
            break
    ran = run("answer", image, question, "--model", folder, *FASTV, "--max-new-tokens", 6, "--num-beams", 3)
    assert ran.code == 0, ran.err
    assert ran.out == beams.text + "\n" != greedy.text + "\n"
    assert f"fastv at 0.5: {beams.trace.summary(0)}" in ran.err


def test_videos(run: Runner, tmp_path: Path, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, after the images; here folders of frames."""
    name = "qwen2_5_vl"
    model = load_video_vlm(tmp_path / name, name)
    monkeypatch.setattr("tokenprune.api.load", lambda source, **options: model)
    films = [tmp_path / "one", tmp_path / "two"]
    for seed, film in enumerate(films):
        film.mkdir()
        for place, frame in enumerate(clip(6, seed=seed)):
            Image.fromarray(frame).save(film / f"{place}.png")
    image = album / "first.png"
    words = ("What?", "--model", tmp_path / name, *FASTV, "--max-new-tokens", 4)
    ran = run("answer", image, *words, "--video", films[0], "--video", films[1], "--frames", 4)
    assert ran.code == 0, ran.err
    fastv = tp.strategy("fastv", budget=0.5)
    said = [(image, model.answer(image, "What?", fastv, 4))]
    said += [(film, model.answer(None, "What?", fastv, 4, video=film, frames=4)) for film in films]
    indented = ["\n    ".join(f"{path}: {answer.text}".splitlines()) for path, answer in said]
    assert ran.out == "".join(f"{line}\n" for line in indented)
    for _, answer in said:
        assert f"fastv at 0.5: {answer.trace.summary(0)}" in ran.err
    alone = run("answer", *words, "--video", films[0], "--fps", 1)
    assert alone.out == model.answer(None, "What?", fastv, 4, video=films[0], fps=1).text + "\n"


def test_a_family_without_videos(run: Runner, folder: Path, album: Path) -> None:
    ran = run("answer", "What?", "--video", album, "--model", folder)
    assert (ran.code, ran.out) == (2, "")
    assert "error: llava: videos of LLaVA-1.5 are not supported; pass frames as images" in ran.err.splitlines()


def test_options_that_a_plugins_model_does_not_have(
    run: Runner, folder: Path, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        def answer(self, image: Any, prompt: str, strategy: Any = None, max_new_tokens: int = 64) -> Answer:
            return Answer(f"{image.name} {prompt}")

    monkeypatch.setattr("tokenprune.api.load", lambda source, **options: Plain())
    words = ("answer", album / "first.png", "What?", "--model", folder)
    assert run(*words).out == "first.png What?\n"
    assert_one_line(run(*words, "--num-beams", 2), "its answer() takes no num_beams=; leave out --num-beams")
    assert_one_line(run(*words, "--video", album), "its answer() takes no video=; leave out --video")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("{album}/none.png", "What?"), ("none.png", "no such file")),
        (("{album}/first.png", "  "), ("question is empty",)),
        (("{album}/first.png", "What?", "--max-new-tokens", "0"), ("--max-new-tokens: 0", "at least 1")),
        (("{album}/first.png", "What?", "--num-beams", "0"), ("--num-beams: 0", "at least 1")),
        (("{album}/first.png", "What?", "--frames", "2"), ("--frames without a video", "pass --video")),
        (("What?", "--fps", "2"), ("--fps without a video",)),
        (("What?", "--video", "{album}/none.mp4"), ("none.mp4", "no such file")),
        (("What?", "--video", "a" * 5000), ("video 'aaa", "no such file")),
        (("{album}/first.png", "What?", "--threads", "0"), ("--threads: 0",)),
        (("{album}/first.png", "What?", "--strategy", "fastvv"), ("did you mean 'fastv'",)),
        (("{album}/first.png", "What?", "--budget", "7"), ("budget must be", "got 7")),
        (("{album}/first.png", "What?", "--model", "lisa-tiny"), ("lisa-tiny", "makes masks", "tokenprune segment")),
        (("{album}/first.png", "What?", "--model", "fake"), ("fake", "makes masks")),
        (("{album}/first.png", "What?", "--device", "gpu7"), ("gpu7",)),
        (("{album}/*.jpg", "What?"), ("matches no file",)),
    ],
)
def test_bad_input_is_one_clear_line(
    run: Runner, folder: Path, album: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    filled = [part.format(album=album) for part in arguments]
    defaults = {"--model": folder, "--strategy": "fastv"}
    rest = [part for name, value in defaults.items() if name not in filled for part in (name, value)]
    assert_one_line(run("answer", *filled, *rest), *parts)


def test_a_model_that_takes_no_words(run: Runner, folder: Path, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.api.load", lambda source, **options: torch.nn.Linear(1, 1))
    ran = run("answer", album / "first.png", "What?", "--model", folder)
    assert_one_line(ran, f"model '{folder}' is a Linear, which has no answer(image, prompt)")


def test_the_model_has_to_be_named(run: Runner, album: Path) -> None:
    ran = run("answer", album / "first.png", "What?")
    assert ran.code == 2
    assert "--model" in ran.err
