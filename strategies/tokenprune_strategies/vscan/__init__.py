"""VScan: patches of every window and of the whole image, the others merged into them, then attention in the decoder."""
