"""PruMerge and PruMerge+: which tokens are kept, and what is merged into them."""
