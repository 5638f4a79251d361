"""Pruning strategies: one file, or one folder, for each paper.

A new method is a file here (see the extension guide), and a line in `plugin.py`. What several methods share is in
`ops/`. A strategy knows `tokenprune.core` and nothing else of tokenprune.
"""
