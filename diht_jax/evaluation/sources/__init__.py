"""Sources of evaluation tasks."""
