"""Weights in and out: files and layouts of other CLIPs, and the released DiHT models."""
