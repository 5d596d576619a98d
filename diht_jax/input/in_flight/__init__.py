"""Decoded examples on their way to the devices: how many, their memory, and joining them."""
