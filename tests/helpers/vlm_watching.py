"""What vision-language models themselves tell of their image tokens, found without the adapter: for tests of it.

Everything here is found by running the untouched model: by asking of which patches behind the tower an image
token is made, by recording the weights of eager attention, by looking for separators in the decoder's input.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from vlm_configs import VIDEO
from vlm_families import FAMILIES
from vlm_known import CASES, SECOND_LAST, SEPARATED, TOWERS, WITH_CLS, has_videos, is_packed, model_of

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom, ReceivedAttention
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune_adapters.hf.families import FAMILIES as KNOWN


def inputs_of(name, case="two sizes", padding="left"):
    return dict(_inputs_of(name, case, padding))


@functools.cache
def _inputs_of(name, case, padding):
    return FAMILIES[name].inputs(CASES[case], padding=padding)


def read(model, strategy, inputs, run=None):
    """What the strategy saw in a forward (or whatever `run` does) of the model; and the trace."""
    with torch.no_grad(), tokenprune.prune(model, strategy) as opened:
        (run or (lambda: model(**inputs)))()
    return strategy.seen, opened.trace


class Reader(Strategy):
    """Keeps everything; `seen` holds what it read, and the grid cells and image numbers, by field."""

    name = "reader"

    def __init__(self, *reads, layer=0):
        super().__init__()
        self.reads, self.layer, self.seen = reads, layer, {}

    def stages(self, shape):
        return [Stage("read", self.layer, reads=self.reads)]

    def choose(self, stage, tokens):
        fields = [read.field for read in self.reads]
        self.seen = {field: getattr(tokens, field) for field in (*fields, "exists", "image", "grid")}
        return Keep.where(tokens.active)


class Half(Reader):
    """Keeps the better half by what the tower's patches receive, and half of these by the last row's attention."""

    name = "half"

    def stages(self, shape):
        return [
            Stage("received", 1, reads=ReceivedAttention()),
            Stage("attention", 2, reads=AttentionFrom("last")),
        ]

    def choose(self, stage, tokens):
        scores = tokens.received_attention if stage.name == "received" else tokens.attention
        scores = scores.masked_fill(~tokens.active, float("-inf"))
        return Keep.top(scores, tokens.count(0.5 if stage.name == "received" else 0.25))


def base_of(model):
    return model.base_model


def tower_of(model, inputs=()):
    """The tower that takes the images of the inputs, or their videos."""
    base = base_of(model)
    for name in ("video_tower", *TOWERS) if has_videos(inputs) else TOWERS:
        if hasattr(base, name):
            tower = getattr(base, name)
            return getattr(tower, "vision_model", tower)  # nested in older releases
    raise AssertionError("no tower")


def blocks_of(model, inputs=()):
    tower = tower_of(model, inputs)
    if hasattr(tower, "blocks"):
        return list(tower.blocks)
    tower = getattr(tower, "transformer", tower)
    inner = getattr(tower, "encoder", tower)
    return list(getattr(inner, "layers", None) or inner.layer)


def attention_of(block):
    return next(getattr(block, name) for name in ("self_attn", "attention", "attn") if hasattr(block, name))


def projector_of(model):
    base = base_of(model)
    if hasattr(base, "connector"):
        return base.connector.modality_projection
    if hasattr(base, "visual_embeddings_table"):
        return base.vision_tower.head_linear
    for name in ("aligner", "mm_projector", "projector", "resampler_model", "vision_adapter", "vision_projection"):
        if hasattr(base, name):
            return getattr(base, name)
    for name in ("connector", "patch_merger"):
        if hasattr(tower_of(model), name):
            return getattr(tower_of(model), name)
    if hasattr(base, "layerwise_projectors"):
        return base.layerwise_projectors[0]
    if hasattr(base, "mm_projector"):
        return base.mm_projector
    if hasattr(base, "projector"):
        return base.projector
    return base.multi_modal_projector if hasattr(base, "multi_modal_projector") else base.visual.merger


def encoded(model, inputs, mode=torch.no_grad):
    """[T, width]: image features of the whole batch in the order in which they are merged."""
    base = base_of(model)
    with mode():
        if has_videos(inputs):
            names = "pixel_values_videos", "video_grid_thw", "video_merge_sizes"
            given = [inputs[k] for k in names if k in inputs]
            out = base.get_video_features(*given)
        else:
            names = "pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "batch_num_images"
            known = (*names, "image_merge_sizes", "high_res_pixel_values", "image_token_pooling", "image_grids")
            out = base.get_image_features(**{k: inputs[k] for k in known if k in inputs})
    parts = out.deepstack_features[0][1] if out.pooler_output is None else out.pooler_output
    if hasattr(base, "apply_pooling") and has_videos(inputs) and parts.shape[1] % 4 == 0:
        newline = base.image_newline.expand(len(parts), 1, -1)  # which older releases add later
        parts = torch.cat((parts, newline), 1)
    return torch.cat([part.flatten(0, -2) for part in ([parts] if isinstance(parts, Tensor) else parts)])


def decoder_input(name, model, inputs):
    """[batch, sequence, width]: what enters the first decoder layer of the untouched model."""
    caught = []

    def catch(module, args, kwargs):
        caught.append(args[0] if args else kwargs["hidden_states"])

    handle = FAMILIES[name].decoder(model).layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return caught[0]


def separators(name, model, inputs):
    """Bool [batch, sequence]: placeholders that show no part of an image: newlines, borders, [CLS] of frames."""
    if name == "video_llava":
        video = inputs["input_ids"] == VIDEO
        return video & ((video.cumsum(1) - 1) % 17 == 0)
    if name == "hunyuan_vl":
        sizes = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
        flags = [[True, *([False] * columns + [True]) * rows, True] for rows, columns in sizes]
        found = FAMILIES[name].image_tokens(inputs)
        return found.masked_scatter(found, torch.tensor([flag for image in flags for flag in image]))
    if name not in SEPARATED:
        return torch.zeros_like(inputs["input_ids"]).bool()
    base = model.base_model
    newline = getattr(base, "image_newline", getattr(base, "view_separator", None))
    if newline is None:  # the embedding of a word
        newline = model.get_input_embeddings().weight[base.vocabulary_mapping.eol_token_id]
    return (decoder_input(name, model, inputs) == newline).all(-1)


@functools.cache
def contributions(name, case):
    """[T, P]: share of each patch, in the order in which the tower works, in each image token.

    Told by the gradient of a token behind the tower: where tokens are mixed behind the projector, shares are the
    gradient itself; elsewhere the patches that matter at all have equal shares.
    """
    model, inputs, caught = model_of(name), inputs_of(name, case), []
    behind_projector = is_packed(name, inputs) and KNOWN[model.config.model_type].images.projects
    place = projector_of(model) if behind_projector else blocks_of(model, inputs)[-2 if name in SECOND_LAST else -1]
    cut = 1 if name in WITH_CLS and not behind_projector else 0

    def catch(module, args, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = place.register_forward_hook(catch)
    tokens = encoded(model, inputs, torch.enable_grad)
    handle.remove()
    # the sum of a token behind a norm is the same whatever the patches are
    values = tokens.sum(1) if behind_projector else tokens[:, 0]
    rows = [torch.autograd.grad(value, caught, retain_graph=True) for value in values]
    width = caught[0].shape[-1]
    gradients = torch.stack([torch.cat([part[..., cut:, :].reshape(-1, width) for part in row]) for row in rows])
    if behind_projector:
        return gradients.mean(-1)
    support = (gradients.abs().amax(-1) > 0).float()
    return support / support.sum(1, keepdim=True).clamp(min=1)


class Eager:
    """Attention weights and keys of tower layers, recorded from the model's own eager attention."""

    def __init__(self, name, inputs):
        self.model = FAMILIES[name].build("eager")
        self.cut = 1 if name in WITH_CLS else 0
        attentions = [attention_of(block) for block in blocks_of(self.model, inputs)]
        self.calls = [[] for _ in attentions]
        home = sys.modules[type(attentions[0]).__module__]
        original = home.eager_attention_forward

        def record(module, query, key, *args, **kwargs):
            output, weights = original(module, query, key, *args, **kwargs)
            for number, attention in enumerate(attentions):
                if attention is module:
                    self.calls[number].append((weights, key))
            return output, weights

        home.eager_attention_forward = record
        try:
            encoded(self.model, inputs)
        finally:
            home.eager_attention_forward = original

    def received(self, layer):
        """[P, 1]: mean over the rows that see a patch at all."""
        means = []
        for weights, _ in self.calls[layer]:
            rows = (weights > 0).any(1).sum(1).clamp(min=1)
            means.append((weights.mean(1).sum(1) / rows)[..., None])
        return self._patches(means)

    def cls(self, layer):
        """[P, 1]."""
        return self._patches([weights.mean(1)[:, 0, :, None] for weights, _ in self.calls[layer]])

    def keys(self, layer):
        """[P, C]."""
        return self._patches([torch.cat(key.unbind(1), -1) for _, key in self.calls[layer]])

    def _patches(self, values):
        return torch.cat([value[:, self.cut :].flatten(0, 1) for value in values])


def mixed(name):
    """One row with a video and, behind it, an image."""
    video, image = FAMILIES[name].inputs(CASES["videos"][:1]), FAMILIES[name].inputs([(24, 32)])
    both = {key: torch.cat((video[key], image[key]), 1) for key in video if key in image and video[key].dim() == 2}
    return {**video, **image, **both}
