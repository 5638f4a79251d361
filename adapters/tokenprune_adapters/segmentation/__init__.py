"""Shared code of models that answer with masks: queries, prompts, generation, loading, SAM's mask decoder.

Belongs here: code that LISA, GLaMM, PixelLM and Sa2VA have in common. Code of a single family is in its folder.
"""
