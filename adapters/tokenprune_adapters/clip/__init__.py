"""CLIP's vision tower: loading it, checking that it matches a checkpoint, and the reads that it provides."""
