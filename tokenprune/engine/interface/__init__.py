"""The engine's interface to a model: its image tokens, the reads of its vision side, compatibility with strategies.

Belongs here: the classes that adapters for live models implement, and checks of their results.
"""
