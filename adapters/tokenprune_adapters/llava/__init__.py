"""LLaVA's way of putting images into a decoder: prompt, projector, tower features, the decoder's weights."""
