"""Model adapters: one folder for each model family, what several share beside them, and the bundled models.

A new family is a folder here (see the extension guide), and a line in `plugin.py`. An adapter imports `tokenprune.core`
and the layers below it, `engine`, `api` and `loading`.
"""
