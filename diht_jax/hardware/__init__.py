"""Chips, topologies, FLOPs, traffic of compiled programs, and bounds on their time."""
