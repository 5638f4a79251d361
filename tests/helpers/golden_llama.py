"""Reference runs of methods inside a decoder: their LLaMA, inputs, prefill and greedy decoding under a strategy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import tokenprune
from tokenprune.core.decisions import Decision
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.core.trace import Trace


@dataclass
class Reference:
    """A folder of reference data with weights."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Reference:
        return cls(json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors"))

    def llama(self, attention: str = "sdpa") -> Any:
        """Their decoder as transformers' own."""
        from transformers import LlamaConfig, LlamaForCausalLM

        dims = {name: value for name, value in self.about["dims"].items() if name != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": self.about["dims"]["rope_theta"]}
        model = LlamaForCausalLM(LlamaConfig(**dims, rope_parameters=rope, attn_implementation=attention)).eval()
        weights = {n.removeprefix("weights."): t.float() for n, t in self.tensors.items() if n.startswith("weights.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not missing
        assert all("inv_freq" in name for name in unexpected)
        return model

    def image_tokens(self, starts: list[int] | None = None) -> Tensor:
        """bool [batch, sequence]: where the image stands, in rows that begin it at `starts`."""
        first, images, behind = self.about["PRE"], self.about["IMG"], self.about["T"]
        starts = starts or [first]
        mask = torch.zeros(len(starts), first + images + behind, dtype=torch.bool)
        for row, start in enumerate(starts):
            mask[row, start : start + images] = True
        return mask


@dataclass
class Ran:
    """What a run gave: logits and final-norm states of all positions, logits of the decode steps, the trace."""

    logits: Tensor
    hidden: Tensor
    decoded: Tensor
    trace: Trace
    kv_lengths: list[int]

    def rows(self, row: int = 0) -> list[int]:
        """Positions that are there in the last layer."""
        layout, active = self.trace.layout, self.trace.stages[-1].active[row]
        present = layout.valid[row] & ~layout.image_tokens[row]
        present[layout.slots[row, active]] = True
        return present.nonzero().flatten().tolist()


def run(
    model: Any,
    strategy: Strategy,
    embeddings: Tensor,
    image_tokens: Tensor,
    fed: list[int] | None = None,
    **given: Any,
) -> Ran:
    """Prefill, and then a decode step for each token of `fed` (batch of one); `given` goes to `tokenprune.prune`."""
    with torch.no_grad(), tokenprune.prune(model, strategy, image_tokens=image_tokens, **given) as pruning:
        output = model(inputs_embeds=embeddings.float(), use_cache=True, output_hidden_states=True)
        cache, steps = output.past_key_values, []
        for token in fed or []:
            step = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            steps.append(step.logits[0, -1])
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    decoded = torch.stack(steps) if steps else torch.zeros(0)
    return Ran(output.logits, output.hidden_states[-1], decoded, pruning.trace, lengths)


def watched(kind: type[Strategy]) -> type[Strategy]:
    """The strategy, noting for every stage what it saw and answered in `seen`: (stage, tokens, decision)."""

    class Watched(kind):  # type: ignore[valid-type,misc]
        def choose(self, stage: Stage, tokens: Tokens) -> Decision:
            answer: Decision = super().choose(stage, tokens)
            for read in stage.reads:
                tokens.read(read)
            self.__dict__.setdefault("seen", []).append((stage, tokens, answer))
            return answer

    return Watched
