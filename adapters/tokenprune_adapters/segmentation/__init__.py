"""What models that answer with masks share: queries, prompts, generation, loading, SAM's mask decoder.

Goes here: what LISA, GLaMM and PixelLM have in common. What one family does is in its own folder.
"""
