"""Helpers that know nothing of pruning: arguments, files, pictures, masks, time, threads, PyTorch's global state.

Goes here: what would be as useful in another project. A module here imports `tokenprune.errors` and nothing else of
tokenprune.
"""
