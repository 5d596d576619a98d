"""Measurements for the first hour on an accelerator, as one command that can be resumed."""
