"""Code for LLaVA-like models: prompt, projector, reads of the tower, the decoder's weights."""
