"""Flash attention counts a sliding window in the keys that it is given, which lack pruned tokens: refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

import tokenprune as tp
from tokenprune.errors import UnsupportedError

WINDOW, NAME = 12, "flash_by_name"
REFUSED = f"{NAME} counts the sliding window of {WINDOW} tokens without those that were pruned, of {{}} in all"


def model(windows: bool = True) -> Any:
    """A decoder whose attention has the name and the masks of flash attention, which needs a GPU."""
    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    kinds = ["sliding_attention" if windows else "full_attention", "full_attention"]
    config = Qwen2Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=kinds,
    )
    built = Qwen2ForCausalLM(config).eval()
    built.config._attn_implementation = NAME  # transformers looks for a kernel of that name otherwise
    return built


def pruned(built: Any, length: int) -> Any:
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, 2:6] = True
    return tp.prune(built, tp.strategy("random", keep=0.5), image_tokens=image)


def test_a_prompt_longer_than_the_window_is_refused() -> None:
    built = model()
    ids = torch.arange(WINDOW + 1)[None]
    with torch.no_grad(), pruned(built, WINDOW + 1), pytest.raises(UnsupportedError, match=REFUSED.format(13)):
        built(ids)


def test_an_answer_that_grows_out_of_the_window_is_refused() -> None:
    built, cache = model(), DynamicCache()
    with torch.no_grad(), pruned(built, WINDOW - 1):
        built(torch.arange(WINDOW - 1)[None], past_key_values=cache)
        built(torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(UnsupportedError, match=REFUSED.format(13)):
            built(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("strategy", ["none", "random"])
def test_without_windows_or_without_pruning_nothing_is_refused(strategy: str) -> None:
    built = model(windows=strategy == "none")
    ids = torch.arange(WINDOW + 1)[None]
    image = ids < 4
    options = {} if strategy == "none" else {"keep": 0.5}
    with torch.no_grad(), tp.prune(built, tp.strategy(strategy, **options), image_tokens=image):
        assert torch.isfinite(built(ids).logits).all()
