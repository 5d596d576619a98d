"""Zero-shot evaluation: tasks and their protocols, results and pages of pictures."""
