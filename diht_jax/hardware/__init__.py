"""Chips and topologies, and the FLOPs, memory traffic and roofline of compiled programs."""
