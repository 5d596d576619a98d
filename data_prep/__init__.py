"""Offline preparation of image-text pairs: filtering, labelling, and the synthetic web."""
