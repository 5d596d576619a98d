"""Training: the loop, the step, the objective, the work directory, monitoring."""
