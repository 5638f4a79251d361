"""Tools to test a strategy, an adapter or a dataset with: conformance kits, the masked oracle, tiny models.

Goes here: what the tests of a plugin import, and the pytest plugin that comes with the package. What the kits are made
of is in `kit/`. A kit for another kind of plugin is a module `…_conformance` here.
"""
