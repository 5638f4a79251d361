"""A reasoning-segmentation model on real photographs: SmolLM2 as decoder, EfficientNet-Lite0's grid as image tokens."""
