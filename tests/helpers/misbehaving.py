"""Plugins that misbehave, and the page docs/extend/misbehaving.md with the message that each one gets.

`python tests/helpers/misbehaving.py` writes the page anew.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fake_segmentation import FakeModel
from misbehaving_sources import ADAPTER, DATASET, OBSERVER
from plugin_packages import install, registering, searched

import tokenprune as tp
from tokenprune.errors import PluginWarning
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extend" / "misbehaving.md"

STRATEGY = """
import sys

from tokenprune import Keep, Merge, Stage, Strategy, hookimpl
from tokenprune.core.reads import AttentionFrom, HiddenStates
import torch


@hookimpl
def tokenprune_register_strategies(register):
    register("bad", Bad, summary="misbehaves")


class Bad(Strategy):
    name = "bad"

    def stages(self, shape):
        return [Stage("prune", 2, 3, (AttentionFrom("last"), HiddenStates()))]

    def choose(self, stage, tokens):
        batch, total = tokens.exists.shape
        {act}
"""


@dataclass(frozen=True)
class Case:
    """One way to misbehave.

    Attributes:
        title: what the plugin does.
        source: of its module.
        when: when it is noticed: "load", "use", "run" or "after"; "adapter" and "data" where those run.
        strict: whether it is noticed in strict mode only.
    """

    title: str
    source: str
    when: str
    strict: bool = False


def choosing(title: str, act: str, when: str = "run", strict: bool = False) -> Case:
    """A strategy whose `choose` does that."""
    return Case(title, STRATEGY.replace("{act}", act.replace("\n", "\n        ")), when, strict)


def fixed(title: str, index: str) -> Case:
    """A strategy that answers with these numbers."""
    return choosing(title, f"return Keep(torch.tensor({index}).expand(batch, -1))")


def acting(title: str, source: str, act: str, when: str = "run", strict: bool = False) -> Case:
    """A plugin of another kind that does that."""
    return Case(title, source.replace("{act}", act), when, strict)


CASES = (
    Case("cannot be imported", "import surely_not_installed\n", "load"),
    Case("is built for another version of the hooks", registering("bad", tokenprune_hook_api="2.0"), "load"),
    Case("registers junk", registering("bad", target="a strategy"), "load"),
    Case(
        "registers what is no strategy",
        registering("bad", target="collections:OrderedDict"),
        "use",
    ),
    Case(
        "takes an argument that the hook does not have",
        registering("bad").replace("(register)", "(registry)"),
        "load",
    ),
    Case(
        "declares reads that are none",
        STRATEGY.replace("HiddenStates())", "HiddenStates)").replace("{act}", "return Keep.top(tokens.attention, 3)"),
        "run",
    ),
    Case("takes a name that another package has", registering("uniform"), "use"),
    choosing("raises in `choose`", 'raise ValueError("nothing to choose from")'),
    choosing("answers with the wrong shape", "return Keep(torch.zeros(1, 3, dtype=torch.int64))"),
    choosing("answers with the wrong dtype", "return Keep(torch.ones(batch, 3))"),
    choosing("answers on the wrong device", 'return Keep(torch.zeros(batch, 3, dtype=torch.int64, device="meta"))'),
    fixed("chooses a token that does not exist", "[0, 1, 600]"),
    fixed("chooses a token twice", "[0, 4, 4]"),
    fixed("answers out of order", "[4, 0, 2]"),
    fixed("keeps another number than it declared", "[0, 2]"),
    choosing(
        "scores with NaN",
        "return Keep.top(tokens.attention / 0 * 0, 3)",
    ),
    choosing(
        "merges with weights that are too large for the model's type",
        "weights = torch.eye(total, dtype=torch.float64)[:3].expand(batch, -1, -1) * 1e300\n"
        "return Merge(torch.arange(3).expand(batch, -1), weights=weights)",
    ),
    choosing("leaves the program", 'sys.exit("no weights found")'),
    choosing(
        "changes a setting of PyTorch",
        "torch.set_default_dtype(torch.float64)\nreturn Keep.top(tokens.attention, 3)",
        strict=True,
    ),
    choosing("replaces its memory", "tokens.memory = {}\nreturn Keep.top(tokens.attention, 3)"),
    choosing("modifies a tensor of Tokens in place", "return Keep.top(tokens.attention.mul_(2), 3)", strict=True),
    choosing("reads what it did not declare", "return Keep.top(tokens.embeddings.norm(dim=-1), 3)"),
    choosing(
        "keeps a tensor of Tokens",
        "self.kept = tokens.hidden\nreturn Keep.top(tokens.attention, 3)",
        "after",
        strict=True,
    ),
    acting("fails as an observer", OBSERVER, 'raise OSError("No space left on device")'),
    acting("modifies the run as an observer", OBSERVER, "run.state.active.fill_(True)", strict=True),
    Case(
        "has a hook that would never run",
        OBSERVER.replace("def", "async def"),
        "load",
    ),
    acting("fails as an adapter", ADAPTER, 'return PromptMasks(self.masks["image"], queries)', "adapter"),
    acting("marks numbers as an adapter", ADAPTER, "return PromptMasks(torch.tensor([[2, 3, 4]]), queries)", "adapter"),
    acting("gives small masks as a dataset", DATASET, "replace(query, mask=query.mask[:8, :8])", "data"),
)


def misbehave(case: Case, folder: Path, check: Callable[[], None] = lambda: None) -> str:
    """The message that the plugin gets; `check` is called while it is still installed."""
    install(folder, "bad-pack", case.source)
    install(folder, "good-pack", registering("good", target="tokenprune_strategies.baselines:Uniform"))
    with searched(folder):
        message = _message(case)
        check()
    return message


def run(name: str, marked: bool = True, strict: bool = False) -> torch.Tensor:
    """Logits of a tiny model under a strategy; image tokens are marked here, or by an adapter."""
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[:, 2:8] = True
    with torch.no_grad(), tp.prune(MODEL, tp.strategy(name), image_tokens=image if marked else None, strict=strict):
        logits: torch.Tensor = MODEL(torch.arange(24).reshape(2, 12)).logits
    return logits


MODEL = tiny_llama(4)


def _message(case: Case) -> str:
    if case.when == "load":
        (broken,) = registry.broken_plugins()
        return broken.error
    name = "uniform" if "another package" in case.title else "bad"
    if case.when == "adapter" or "observer" in case.title:
        name = "fastv"
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if case.when == "data":
                tp.compare(FakeModel(), "bad", ["none"], limit=2, timing_samples=0)
            else:
                run(name, marked=case.when != "adapter", strict=case.strict)
    except tp.TokenPruneError as error:
        return f"{type(error).__name__}: {error}"
    # strict mode collects garbage, which may warn of what other tests left open
    (warning,) = (warning for warning in told if warning.category is PluginWarning)
    return f"{warning.category.__name__}: {warning.message}"


INTRO = """# Ways to misbehave

What a plugin does wrong is reported with its name and that of its package, or of the strategy and its stage; the model
is left as it was before, and other plugins work. These are real messages, of a package `bad-pack` with a plugin `plug`;
`python tests/helpers/misbehaving.py` writes this page, and a test compares it with what really happens.

A plugin that fails while it loads is set aside: `tokenprune list --plugins` shows it with the message. What goes wrong
in a run is an exception. What is raised by your own code inside `with tokenprune.prune(…)` is never attributed to a
plugin, and running out of memory (`torch.OutOfMemoryError`, `MemoryError`) passes as it is, so that you can catch it.

## In every run
"""

STRICT = """## In strict mode

What costs time to look for, or cannot harm others, is looked for by the [conformance kit](conformance.md), which your
tests should run, and under `tokenprune.prune(…, strict=True)`.
"""

OUTRO = """## What is not seen

- Writes through `.data` or `.numpy()`, and writes to tensors of `torch.inference_mode()`: PyTorch does not count them.
  The conformance kit compares values, and sees them; it also sees draws from the global random generator.
- Copies that a plugin keeps. Tensors with gradients, which autograd may keep, and answers of the vision side, which may
  serve several prefills, are left out too. Keeping is reported once for each strategy class.
- A plugin is code that you run on purpose: nothing holds it back from changing a model's weights, writing files or
  never returning.
"""


def page() -> str:
    """The text of the page."""
    parts = [INTRO]
    for strict in (False, True):
        parts += [STRICT] * strict
        for case in CASES:
            if case.strict is strict:
                with tempfile.TemporaryDirectory() as folder:
                    message = misbehave(case, Path(folder))
                parts.append(f"It {case.title}:\n\n```text\n{wrapped(message)}\n```\n")
    return "\n".join([*parts, OUTRO])


def wrapped(text: str, width: int = 76) -> str:
    """Lines of at most that many characters, broken at spaces only."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    PAGE.write_text(page(), encoding="utf-8")
