"""Example data sets from public packages: their sources, and the code that converts them."""
