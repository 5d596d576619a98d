"""Methods beyond the paper, which no recipe enables; disabled, they add nothing to the step."""
