"""Helpers independent of pruning: arguments, files, pictures, masks, time, threads, PyTorch's global state.

Goes here: what another project could use as well. Of tokenprune, modules here import only `tokenprune.errors`. A new
subject is a new module.
"""
