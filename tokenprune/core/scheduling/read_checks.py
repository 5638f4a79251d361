"""Checks of what a stage read: a choice made of values that are not finite would be wrong, and nobody would notice."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tokenprune.core.reads import Read, TextEmbeddings, TextKeys, TextStates, TextValues
from tokenprune.core.scheduling.validation import ValueChecks
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError

OF_TEXT = (TextEmbeddings, TextKeys, TextStates, TextValues)


def read_checks(tokens: Tokens, who: str, stage: str) -> ValueChecks:
    """Checks that the values read so far are finite at each row's image tokens, or text tokens.

    Comparisons with NaN are false, so that a ranking of it has some order. Padding may hold anything. Infinity is
    allowed where a read gives it a meaning (`Read.infinite`).

    Args:
        tokens: what the strategy saw.
        who: strategy name, for messages.
        stage: stage name, for messages.
    """
    checks = ValueChecks()
    for read, value in tokens.given().items():
        of_text = isinstance(read, OF_TEXT)
        axis = 1 if of_text else read.axis
        if axis is None or not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            continue
        real = tokens.text if of_text else tokens.active | tokens.parked if read.present else tokens.exists
        by_token = value.detach().movedim(axis, 1).reshape(*real.shape, -1)
        ends = by_token.amax(-1), by_token.amin(-1)  # NaN if there is one; far cheaper than a test of every value
        wrong = ends[0].isnan() if read.infinite else ~(ends[0].isfinite() & ends[1].isfinite())
        wrong = wrong.to(real.device) & real
        checks.add(wrong, partial(_refusal, who, stage, read, wrong))
    return checks


def _refusal(who: str, stage: str, read: Read, wrong: Tensor) -> InputError:
    row, token = wrong.nonzero()[0].tolist()
    found = "NaN" if read.infinite else "NaN or infinity"
    where = f"{'text' if isinstance(read, OF_TEXT) else 'image'} token {token} of batch row {row}"
    return InputError(
        f"strategy {who!r}, stage {stage!r}: {found} in tokens.{read.field} ({read}), at {where}; expected finite "
        "numbers: check the model's weights, its input and its number format (float16 overflows where bfloat16 and "
        "float32 do not)"
    )
