"""The option that strategies share which look at the text in CLIP's space."""

from __future__ import annotations

from typing import Literal

Wording = Literal["question", "query"]
"""See `tokenprune.reads.ClipTextEmbeddings`."""
WORDING = "the text that counts: question, the whole one that the model is asked; query, the user's own words"
