"""Nüwa: anchors in all regions of the image, which take in what is similar and near; then pruning in the decoder."""
