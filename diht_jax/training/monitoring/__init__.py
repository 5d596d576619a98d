"""What a run reports and watches: metrics, throughput, profiles, anomalies."""
