"""Evaluation protocols: how a source is measured."""
