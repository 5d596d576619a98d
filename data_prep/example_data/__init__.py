"""Example data from public packages: where it comes from, and what is made of it."""
