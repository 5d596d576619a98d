"""HTML pages of the filter and the demo, and the command that shows reports."""
