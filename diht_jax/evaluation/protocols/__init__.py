"""Evaluation protocols: how the tasks of each kind are measured."""
