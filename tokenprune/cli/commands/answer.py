"""`tokenprune answer`: the answer of a model in words to a question about images."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from tokenprune.cli.arguments import Budget, Device, Dtype, Images, OptionTexts, StrategyName, Threads


def command(
    images: Images,
    question: Annotated[str, typer.Argument(help='What to ask of each, in quotes: "What is it?"', metavar="QUESTION")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id of a vision-language model.")],
    strategy: StrategyName = "none",
    option: OptionTexts = None,
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of an answer.")] = 64,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Ask a question about images of a model that answers in words; `segment` is for those that make masks.

    The answer goes to stdout, what was pruned and how long it took to stderr. Several images are asked about one by
    one, and an answer begins with the image's path, its further lines with spaces. If one cannot be used, that is
    reported, the others are processed, and the exit code is 1.
    """
    from tokenprune import api
    from tokenprune.cli.checks import check_model, strategy_request
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
    name, budget, options = strategy_request(strategy, option or [], budget)
    question = words(question, "question", images)
    found = find_images(images)
    check_model(model, dtype=dtype, device=device)
    chosen = api.strategy(name, budget, **options)

    failed = 0
    with ExitStack() as stack:
        stack.enter_context(using(choose(threads)))
        loaded = load_answering_model(model, dtype=dtype, device=device)
        times = stack.enter_context(recorded())
        for image in found.paths:
            with unusable(image, found) as problem, recorded() as milliseconds:
                said = loaded.answer(image, question, strategy=chosen, max_new_tokens=max_new_tokens)
            if problem:
                failed += 1
                continue
            typer.echo(f"{image}: {_indented(said.text)}" if found.many else said.text)
            label = f"{chosen.name}{budget_words(chosen)}"
            note(f"{label}: {said.trace.summary(said.row)}" if said.trace else f"{label}: no pruning")
            note(summary(milliseconds))
    if found.many:
        note(summary(times))
        note(f"{len(found.paths) - failed} of {len(found.paths)} answers in {rate(times, len(found.paths))}")
    if failed:
        note(f"error: {failed} of {len(found.paths)} images could not be used")
        raise typer.Exit(1)


def _indented(text: str) -> str:
    """The text with all lines but the first indented: an unindented line begins with an image's path."""
    return "\n    ".join(text.splitlines())
