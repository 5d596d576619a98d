"""Methods beyond the paper, which no recipe switches on; off, they add nothing to the step."""
