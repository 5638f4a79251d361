"""PruMerge and PruMerge+: selection of tokens, and merging of others into them."""
