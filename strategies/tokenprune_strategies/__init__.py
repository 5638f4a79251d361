"""Pruning strategies: one module per method."""
