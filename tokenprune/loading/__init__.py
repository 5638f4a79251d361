"""From a name to a model: the base class of adapters, and how a checkpoint and its folder are found and checked.

Goes here: what is checked before a family's own code is imported; nothing here imports torch. A family's weights are
loaded by its adapter (`adapters/`).
"""
