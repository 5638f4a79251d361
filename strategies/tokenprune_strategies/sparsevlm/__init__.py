"""SparseVLM and SparseVLM+: raters (text tokens), their ratings of image tokens, and recycling of dropped tokens."""
