"""VisionZip: dominant tokens, and contextual tokens into which the others are merged."""
