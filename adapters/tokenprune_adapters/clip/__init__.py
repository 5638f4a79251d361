"""CLIP's vision tower: reading it, checking it against a checkpoint, and what strategies read of it."""
