"""The observer: one line of JSON for every decision, in the file that TOKENPRUNE_DECISION_LOG names."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from tokenprune import hookimpl

tokenprune_hook_api = "1.0"  # the version of tokenprune's hooks that this is built for

VARIABLE = "TOKENPRUNE_DECISION_LOG"
_LOCK = threading.Lock()  # one model per thread may be pruned


@hookimpl
def tokenprune_decision_taken(run: Any, stage: Any) -> None:
    """Append a line; nothing where the variable is not set or empty. Numbers only: no tensor is kept."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = {
        "time": time.time(),
        "process": os.getpid(),
        "model": run.model,
        "strategy": run.trace.strategy,
        "stage": stage.name,
        "layer": stage.layer,
        "kind": stage.kind,
        "active": stage.kept,
        "parked": stage.parked.sum(1).tolist(),
        "dropped": stage.dropped.sum(1).tolist(),
    }
    with _LOCK, open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
