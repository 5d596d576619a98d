"""What filtering and labelling report: counts, samples, and the HTML page."""
