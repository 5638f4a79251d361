"""VisionZip: dominant tokens, and contextual ones that the others are merged into."""
