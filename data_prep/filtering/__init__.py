"""CAT filtering of image-text pairs, resharding of the output, and replay with other limits."""
