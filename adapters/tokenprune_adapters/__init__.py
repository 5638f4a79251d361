"""Model adapters: one folder for each model family, what several share beside them, and the bundled models.

A new family is a folder here (see the extension guide), and a line in `plugin.py`. An adapter knows `tokenprune.core`,
`tokenprune.engine` and what stands below them.
"""
