"""What lmms-eval reads from the entry-point group `lmms_eval.models`."""

from __future__ import annotations

import os

from lmms_eval.models.registry_v2 import ModelManifest

VARIABLE = "TOKENPRUNE_LMMS_EVAL_REPLACE"
CLASSES = {"llava_hf": "PrunedLlavaHf", "qwen2_5_vl": "PrunedQwen2_5_VL", "qwen3_vl": "PrunedQwen3_VL"}


def manifests() -> list[ModelManifest]:
    """The models, by lmms-eval's names after "tokenprune_"; and under these names themselves, in place of lmms-eval's
    own models, if the variable is set. lmms-eval imports a class when its name is asked for.
    """
    found = []
    for name, chosen in CLASSES.items():
        path = f"tokenprune_lmms_eval.{name}.{chosen}"
        for model_id in (f"tokenprune_{name}", *([name] if os.environ.get(VARIABLE) else [])):
            found.append(ModelManifest(model_id, simple_class_path=f"{path}Simple", chat_class_path=path))
    return found
