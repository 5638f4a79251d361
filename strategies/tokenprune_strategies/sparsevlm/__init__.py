"""SparseVLM and SparseVLM+: which text tokens rate, what they rate, and how dropped tokens are recycled."""
