"""Everything offline; lmms-eval's own files go to a temporary folder."""

from __future__ import annotations

import os
import tempfile

# Read on import.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=tempfile.mkdtemp())
