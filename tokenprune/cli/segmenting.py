"""`tokenprune segment`: what is run, printed and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.printing import note
from tokenprune.errors import IncompatibleError, OptionError, TokenPruneError
from tokenprune.utils import stopwatch
from tokenprune.utils.arguments import whole_number

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy
    from tokenprune.evaluation.many import ImageOutcome
    from tokenprune.evaluation.models import SegmentationModel
    from tokenprune.evaluation.samples import Outcome, SampleRecord


@dataclass(frozen=True)
class Job:
    """One image, its query, and where the results go."""

    image: Path
    query: str
    mask: Path
    overlay: Path | None = None


def segment_all(
    model: SegmentationModel,
    jobs: Sequence[Job],
    strategy: Strategy,
    batch_size: int | None,
    say: Callable[[str], None],
    as_json: bool,
    options: Mapping[str, Any],
) -> list[Path]:
    """Segment the images, write masks and overlays, and print a line for each and a summary.

    Args:
        model: the model.
        jobs: the images, at least one.
        strategy: the strategy.
        batch_size: images that run together, None = the model's own choice; with overlays they run one by one.
        say: prints on stdout.
        as_json: whether lines are JSON objects; the summary then goes to stderr.
        options: further ones of the model's `segment`.

    Returns:
        The images that could not be used; each has been reported on stderr.
    """
    from tokenprune.cli.progress import counted
    from tokenprune.evaluation.many import run_many

    pairs = [(job.image, job.query) for job in jobs]
    failed: list[Path] = []
    alone = jobs[0].overlay is not None
    running: Iterator[ImageOutcome] = run_many(model, pairs, strategy, batch_size, alone, **options)
    reporting = counted("images", len(jobs))
    with stopwatch.recorded() as times, reporting as report, closing(running):  # type: ignore[type-var]  # a generator
        for done in running:
            job = jobs[done.index]
            if done.error is not None:
                failed.append(job.image)
                problem = _problem(job, done.error)
                note(f"error: {problem}")
                if as_json:
                    say(json.dumps({"image": str(job.image), "query": job.query, "error": problem}))
            elif done.outcome is not None:
                with stopwatch.stage("writing"):
                    about = _written(job, done.outcome, done.record)
                say(json.dumps(about) if as_json else _line(about, done.outcome))
            report(done.index + 1)
    tell = note if as_json else say
    tell(stopwatch.summary(times))
    tell(f"{len(jobs) - len(failed)} of {len(jobs)} images segmented in {stopwatch.rate(times, len(jobs))}")
    return failed


def segment_one(
    model: SegmentationModel,
    job: Job,
    strategy: Strategy,
    say: Callable[[str], None],
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Segment the only image, with the time of each stage; errors are raised. Arguments as for `segment_all`."""
    from tokenprune.evaluation.samples import run_single, token_summary

    record = run_single(model, job.image, job.query, strategy, **options)
    outcome = record.outcomes[0]
    about = _written(job, outcome, record)
    if as_json:
        say(json.dumps({**about, "milliseconds": outcome.milliseconds}))
        return
    lines = [f"wrote {job.mask}: {_size(about)}"]
    if job.overlay is not None:
        lines.append(f"wrote {about['overlay']}")
    if "text" in about:
        lines.append(_answer(about))
    say("\n".join([*lines, token_summary(outcome), stopwatch.summary(outcome.milliseconds)]))


def options_of(answer: str, max_new_tokens: int | None, no_draft: bool, mask_size: str | None) -> dict[str, Any]:
    """Options of a model's `segment` from those of the command that were given.

    Raises:
        OptionError: one is impossible, or has no effect.
    """
    options: dict[str, Any] = {}
    if answer == "generate":
        options["answer"] = answer
        if max_new_tokens is not None:
            options["max_new_tokens"] = whole_number("--max-new-tokens", max_new_tokens, 1)
        if no_draft:
            options["draft"] = False
    elif max_new_tokens is not None or no_draft:
        option = "--no-draft" if max_new_tokens is None else "--max-new-tokens"
        raise OptionError(f"{option} has no effect on an answer that is given; add --answer generate")
    if mask_size is not None:
        sides = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", mask_size.strip().lower())
        if sides is None and mask_size != "low":
            raise OptionError(f"--mask-size: {mask_size[:60]!r} found, expected WIDTHxHEIGHT in pixels, or low")
        options["mask_size"] = mask_size if sides is None else (int(sides[2]), int(sides[1]))
    return options


def check_options(model: SegmentationModel, options: Mapping[str, Any]) -> None:
    """Raises IncompatibleError if the model's `segment` does not have one of these options."""
    from tokenprune.evaluation.models import TurnTaking

    for option in options:
        if not TurnTaking(model).takes(option):
            raise IncompatibleError(f"model {model.name!r}: its segment() takes no {option}=; leave its option out")


def _problem(job: Job, error: TokenPruneError) -> str:
    problem = " ".join(str(error).split())
    return problem if str(job.image) in problem else f"image {str(job.image)!r}: {problem}"


def _written(job: Job, outcome: Outcome, record: SampleRecord | None) -> dict[str, Any]:
    """Write the mask and the overlay; returns what is told about them."""
    from tokenprune.report.files import write_mask

    write_mask(outcome.mask, job.mask)
    height, width = outcome.mask.shape
    about = {
        "image": str(job.image),
        "query": job.query,
        "mask": str(job.mask),
        "height": height,
        "width": width,
        "covers": round(float(outcome.mask.mean()), 6),
        "strategy": outcome.label,
        "image_tokens": None,
        "equivalent_tokens": None,
    }
    if outcome.text is not None:
        about |= {"text": outcome.text, "masks": outcome.masks}
    if outcome.trace is not None:
        entered = [entry.image[outcome.row] for entry in outcome.trace.ledger.entries]
        about["image_tokens"] = int(outcome.trace.exists[outcome.row].sum())
        about["equivalent_tokens"] = round(sum(entered) / max(len(entered), 1), 3)
    if job.overlay is not None:
        from tokenprune.report.overlays import inspection_sheet, save

        assert record is not None  # images with overlays run one by one
        about["overlay"] = str(save(inspection_sheet(record), job.overlay))
    return about


def _line(about: dict[str, Any], outcome: Outcome) -> str:
    from tokenprune.evaluation.samples import token_summary

    drawn = f" and {about['overlay']}" if "overlay" in about else ""
    said = f"; {_answer(about)}" if "text" in about else ""
    return f"wrote {about['mask']}{drawn}: {_size(about)}; {token_summary(outcome)}{said}"


def _answer(about: dict[str, Any]) -> str:
    joined = {0: " without a mask", 1: ""}.get(about["masks"], f", {about['masks']} masks in one")
    return f"answer{joined}: {' '.join(about['text'].split())}"


def _size(about: dict[str, Any]) -> str:
    return f"{about['width']}×{about['height']}, mask covers {about['covers']:.1%} of the image"
