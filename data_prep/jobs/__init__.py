"""Shard jobs: tasks and their outputs, worker pools on one machine or a Ray cluster."""
