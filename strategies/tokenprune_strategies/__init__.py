"""Pruning strategies: one file, or one folder, for each paper.

A new method is a file here (see the extension guide) and a line in `plugin.py`. Operations shared by several methods
are in `ops/`. A strategy imports `tokenprune.core`, its public names from `tokenprune`, and the layers below it
(`plugins`, `utils`, `errors`).
"""
