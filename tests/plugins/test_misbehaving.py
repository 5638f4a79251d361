"""Every way to misbehave gets its own message; the model is restored, and other plugins work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from misbehaving import CASES, MODEL, PAGE, Case, misbehave, page, run, wrapped

import tokenprune as tp
from tokenprune.plugins import registry


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_a_plugin_that_misbehaves_is_named_and_spoils_nothing(case: Case, tmp_path: Path) -> None:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in MODEL.modules()]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = MODEL(ids).logits
        expected = run("fastv")

    def others_work() -> None:
        assert "bad-pack" in {plugin.distribution for plugin in registry.plugins()}
        assert tp.strategies()["good"].load()
        with torch.no_grad():
            assert torch.equal(MODEL(ids).logits, before)
        if "as an observer" not in case.title:
            assert torch.equal(run("fastv"), expected)
            assert run("good").shape == expected.shape

    message = misbehave(case, tmp_path, others_work)
    named = r"'bad-pack'|strategy 'bad'.* stage 'prune'"
    assert re.search(named, message), message
    assert wrapped(message) in PAGE.read_text(encoding="utf-8")
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in MODEL.modules()] == hooks
    assert torch.equal(run("fastv"), expected)


def test_the_page_is_what_happens() -> None:
    assert len(CASES) >= 10
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/helpers/misbehaving.py writes the page anew"
