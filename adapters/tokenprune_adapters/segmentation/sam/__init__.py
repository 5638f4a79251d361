"""Segment Anything (SAM) in segmentation models: loading its weights, its preprocessing, and masks by its decoder."""
