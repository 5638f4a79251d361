"""VLMEvalKit's run.py, with its models pruned.

python run_pruned.py path/to/VLMEvalKit/run.py fastv:budget=0.35 --model Qwen2.5-VL-7B-Instruct --data MMBench_DEV_EN

Every model that VLMEvalKit makes is opened in `tokenprune.prune` until the end. Its attribute `model` has to be one of
transformers' own; others are refused.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import tokenprune as tp
from tokenprune.core.by_name import parse_text


def main(program: str, strategy: str, *arguments: str) -> None:
    """Run it.

    Args:
        program: VLMEvalKit's run.py.
        strategy: with its options, the budget among them.
        arguments: of run.py.
    """
    name, options = parse_text(strategy)
    chosen = tp.strategy(name, **options)  # refused before anything is loaded
    folder = str(Path(program).resolve().parent)
    sys.argv, sys.path[:0] = [program, *arguments], [folder]
    from vlmeval.config import supported_VLM  # the functions that make models, by name

    with ExitStack() as contexts:

        def opened(make: Any, *args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            run = contexts.enter_context(tp.prune(made.model, chosen))
            contexts.callback(lambda: print(run))
            return made

        for model, make in supported_VLM.items():
            supported_VLM[model] = partial(opened, make)  # run.py reads the keywords of a partial
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except tp.TokenPruneError as error:
        sys.exit(f"error: {error}")
