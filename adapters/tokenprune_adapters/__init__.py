"""Model adapters: a folder for each model family, folders with shared code, and the bundled models.

A new family is a folder here (see the extension guide) and a line in `plugin.py`. An adapter imports `tokenprune.core`
and the layers below it, `engine`, `api` and `loading`.
"""
