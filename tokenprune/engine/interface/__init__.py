"""What the engine asks of a model: where its image tokens stand, what its vision side answers, whether a strategy runs.

Goes here: the classes that an adapter for live models fills in, and the checks of what it filled in.
"""
