"""The sizes of a decoder from the command line: the options of `flops`, and `--model-shape` of `recommend`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.cost import DecoderSpec


def decoder_spec(shape: str | None, sizes: dict[str, Any]) -> DecoderSpec:
    """The sizes of a decoder.

    Args:
        shape: "7b", "13b", a config.json or its folder; None = "7b", or the sizes alone if there are any.
        sizes: by name, in place of those of the shape.

    Raises:
        CheckpointError: there is no such file, or it is no config.json.
        UnknownNameError: no such shape.
        OptionError: a size that is missing or does not fit the others.
    """
    import json

    from tokenprune.cost import DecoderSpec
    from tokenprune.cost.spec import NAMED
    from tokenprune.errors import CheckpointError, UnknownNameError
    from tokenprune.utils.files import expanded

    if shape is None and sizes:
        return DecoderSpec.of(**sizes)
    if shape is None or shape.lower() in NAMED:
        return DecoderSpec.named(shape or "7b", **sizes)
    path = expanded(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        if path.suffix == ".json" or "/" in shape:
            raise CheckpointError(f"{path}: found no such file, expected a model's config.json")
        raise UnknownNameError.among("model shape", shape, [*NAMED, "a path to a config.json"])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); expected a model's config.json") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found {type(config).__name__}, expected a JSON object as in config.json")
    return DecoderSpec.from_config(config, **sizes)
