"""From a name to a model: what an adapter is, where a checkpoint lies, and what its folder holds.

Goes here: what is asked before a family's own code is imported, so that nothing here imports torch. How a family's
weights are read is its adapter's business (`adapters/`).
"""
