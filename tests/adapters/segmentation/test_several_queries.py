"""Several queries about one image: the prompts begin alike, and what they have in common is computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from bare_decoder import rows_of_calls
from glamm_checkpoints import write_glamm
from lisa_checkpoints import write_lisa
from pixellm_checkpoints import write_pixellm
from torch import nn

import tokenprune as tp
from tokenprune_adapters.llava.prompt import IMAGE_ID, splice

WRITE = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}
IMAGE = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
QUERIES = ["the red ring", "What would one throw?", "it"]


@pytest.fixture(scope="module", params=["lisa-tiny", *WRITE])
def model(request, tmp_path_factory):
    if request.param == "lisa-tiny":
        return tp.load("lisa-tiny")
    if request.param == "pixellm" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__}: its CLIP tower takes no attention_mask")
    return tp.load(WRITE[request.param](tmp_path_factory.mktemp(request.param) / "model"))


@pytest.mark.parametrize("name", [None, "none", "csp", "visionzip"])
@pytest.mark.parametrize("answer", ["forced", "generate"])
def test_several_prompts_give_what_each_alone_gives(model, name, answer):
    strategy = {None: None, "none": tp.strategy("none")}.get(name) or (name and tp.strategy(name, budget=0.5))
    # one by one, since GLaMM asks several queries in one conversation, which is one row
    prompts = [model.prompts([query], answer)[0] for query in QUERIES]
    options = {"strategy": strategy, "answer": answer, "max_new_tokens": 4, "draft": False}
    with rows_of_calls(model.decoder.model.layers) as rows:
        together = model.segment(IMAGE, prompt=prompts, **options)
    count, layers = len(QUERIES), model.decoder.config.num_hidden_layers
    if name != "csp":  # those do not look at the text
        assert [calls[:2] for calls in rows] == [[1, count]] * layers
    for row, prompt in enumerate(prompts):
        alone = model.segment(IMAGE, prompt=prompt, **options)
        assert together.text[row] == alone.text
        mine = together.low_res_logits[torch.tensor(together.query_index) == row]
        assert mine.shape == alone.low_res_logits.shape
        assert torch.allclose(mine, alone.low_res_logits, atol=1e-3)


def test_unpruned_rows_are_computed_whole_where_others_look(model):
    prompts = [model.prompts([query])[0] for query in QUERIES]
    count, layers = len(QUERIES), model.decoder.config.num_hidden_layers
    seen = []
    handle = model.decoder.model.layers[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    with rows_of_calls(model.decoder.model.layers) as rows:
        model.segment(IMAGE, prompt=prompts)
    handle.remove()
    assert (rows, len(seen)) == ([[count]] * layers, 1)
    with rows_of_calls(model.decoder.model.layers) as rows, torch.enable_grad():
        inputs = model.inputs_of(prompts, model.encode_image(IMAGE))
        states, _ = model.run_decoder(inputs)
    assert rows == [[count]] * layers
    assert states.requires_grad


def test_the_common_columns_of_prompts():
    ids = [[1, 5, IMAGE_ID, 7, 8], [1, 5, IMAGE_ID, 7, 9, 9], [1, 5, IMAGE_ID, 7, 8]]
    embed = nn.Embedding(16, 4)
    image = torch.randn(1, 6, 4)
    assert splice(ids, image, embed, [15]).shared == 9
    assert splice(ids, image, embed, [15], continues=True).shared == 9
    assert splice(ids[:1], image, embed, [15]).shared == 10
    assert splice([[1, IMAGE_ID, 5], [IMAGE_ID, 1, 5]], image, embed, [15]).shared == 0
    other = [[1, IMAGE_ID, 5], [1, 5, IMAGE_ID]]
    assert splice(other, image, embed, [15]).shared == 1
