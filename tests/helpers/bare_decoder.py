"""A decoder alone with given prompt masks, and how many rows its layers are called with."""

from __future__ import annotations

from contextlib import contextmanager

from tokenprune.engine import BoundModel, VisionCapture


class BareDecoder(BoundModel, VisionCapture):
    """A decoder without a vision side, whose prompts have these masks."""

    name, tower_layers = "bare decoder", 0

    def __init__(self, decoder, masks):
        self.decoder, self.masks = decoder, masks

    def offers(self):
        return frozenset()

    @contextmanager
    def capture(self, reads):
        yield self

    def prompt_masks(self, queries):
        return self.masks

    def provide(self, read):
        raise AssertionError(read)


@contextmanager
def rows_of_calls(layers):
    """For each layer, the rows of every call of its MLP; without hooks, which would stop the sharing of a prefix."""
    mlps, rows = [layer.mlp for layer in layers], [[] for _ in layers]
    for mlp, found in zip(mlps, rows, strict=True):
        mlp.forward = _counted(mlp.forward, found)
    try:
        yield rows
    finally:
        for mlp in mlps:
            del mlp.forward


def _counted(forward, found):
    def call(states):
        found.append(len(states))
        return forward(states)

    return call
