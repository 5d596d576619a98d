"""Trackers of experiments, which get the metrics of a run in addition to `metrics.jsonl`."""
