"""Metrics, throughput, profiles and anomalies of a run."""
