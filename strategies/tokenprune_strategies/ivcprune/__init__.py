"""IVC-Prune: image tokens whose positions serve as coordinates, and those whose values resemble the text's."""
