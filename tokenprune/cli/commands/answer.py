"""`tokenprune answer`: the answer of a model in words to a question about images or videos."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tokenprune.cli.arguments import Budget, Device, Dtype, Images, OptionTexts, StrategyName, Threads
from tokenprune.cli.arguments import path as parsed
from tokenprune.errors import InputError, OptionError
from tokenprune.utils.files import absent, expanded

Videos = Annotated[
    Optional[list[Path]],  # noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too
    typer.Option(parser=parsed, help="Video file, or folder of a video's frames (several times for several)."),
]
Frames = Annotated[Optional[int], typer.Option(help="Frames of a video that the model sees.")]  # noqa: UP045
Rate = Annotated[Optional[float], typer.Option(help="Frames of a video per second.")]  # noqa: UP045


def command(
    images: Images,
    question: Annotated[str, typer.Argument(help='What to ask of each, in quotes: "What is it?"', metavar="QUESTION")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id of a vision-language model.")],
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of an answer.")] = 64,
    num_beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy decoding.")] = 1,
    video: Videos = None,
    frames: Frames = None,
    fps: Rate = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Ask a question about images or videos of a model that answers in words; `segment` is for those that make masks.

    The answer goes to stdout, what was pruned and how long it took to stderr. Several images and videos are asked about
    one by one, and an answer begins with the path, its further lines with spaces. If one cannot be used, that is
    reported, the others are processed, and the exit code is 1.
    """
    from tokenprune import api
    from tokenprune.cli.checks import check_model, strategy_request
    from tokenprune.cli.images import Images as Found
    from tokenprune.cli.images import find_images, unusable, words
    from tokenprune.cli.models import load_answering_model, quiet_loading
    from tokenprune.cli.printing import note
    from tokenprune.core.budget import budget_words
    from tokenprune.utils.arguments import whole_number
    from tokenprune.utils.stopwatch import rate, recorded, summary
    from tokenprune.utils.threads import checked, choose, using

    quiet_loading()
    checked(threads, "--threads")
    whole_number("--max-new-tokens", max_new_tokens, 1)
    whole_number("--num-beams", num_beams, 1)
    sampling = _sampling(bool(video), frames, fps)
    videos = _existing(video or [])
    name, budget, chosen_options = strategy_request(strategy, option or [], budget)
    question = words(question, "question", images or videos)
    found = find_images(images) if images or not videos else Found([], many=False)
    subjects: list[tuple[Path, Path | None, dict[str, Any]]] = [(path, path, {}) for path in found.paths]
    subjects += [(path, None, {"video": path, **sampling}) for path in videos]
    found = Found([path for path, _, _ in subjects], found.many or len(subjects) > 1)
    search = {} if num_beams == 1 else {"num_beams": num_beams}  # which models of plugins may not have
    check_model(model, dtype=dtype, device=device)
    chosen = api.strategy(name, budget, **chosen_options)

    failed = 0
    with ExitStack() as stack:
        stack.enter_context(using(choose(threads)))
        loaded = load_answering_model(model, dtype=dtype, device=device)
        answer: Callable[..., Any] = loaded.answer
        _check_options(model, answer, [*search, *subjects[-1][2]])
        times = stack.enter_context(recorded())
        for path, image, options in subjects:
            with unusable(path, found) as problem, recorded() as milliseconds:
                said = answer(image, question, strategy=chosen, max_new_tokens=max_new_tokens, **search, **options)
            if problem:
                failed += 1
                continue
            typer.echo(f"{path}: {_indented(said.text)}" if found.many else said.text)
            label = f"{chosen.name}{budget_words(chosen)}"
            note(f"{label}: {said.trace.summary(said.row)}" if said.trace else f"{label}: no pruning")
            note(summary(milliseconds))
    if found.many:
        note(summary(times))
        note(f"{len(found.paths) - failed} of {len(found.paths)} answers in {rate(times, len(found.paths))}")
    if failed:
        what = "images and videos" if videos else "images"
        note(f"error: {failed} of {len(found.paths)} {what} could not be used")
        raise typer.Exit(1)


def _sampling(videos: bool, frames: int | None, fps: float | None) -> dict[str, Any]:
    """The options about frames that are given. Raises OptionError if there are some, and no videos."""
    given: dict[str, Any] = {name: value for name, value in (("frames", frames), ("fps", fps)) if value is not None}
    if given and not videos:
        raise OptionError(
            f"{' and '.join(f'--{name}' for name in given)} without a video; pass --video, or leave it out"
        )
    return given


def _existing(videos: list[Path]) -> list[Path]:
    """The paths, each once. Raises InputError if there is nothing at one."""
    for video in videos:
        if not os.path.exists(expanded(video)):  # unlike Path.exists, also for names that no file can have
            raise InputError(f"video {absent(video)}")
    return list(dict.fromkeys(map(expanded, videos)))


def _check_options(model: str, answer: Callable[..., Any], names: list[str]) -> None:
    """Raise InputError for options that the model's `answer` does not have."""
    known = inspect.signature(answer).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in names:
        if name not in known:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"model {model!r}: its answer() takes no {name}=; leave out {option}, or choose another model"
            )


def _indented(text: str) -> str:
    """The text with all lines but the first indented: an unindented line begins with an image's path."""
    return "\n    ".join(text.splitlines())
