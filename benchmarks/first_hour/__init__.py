"""What the first hour on an accelerator has to show, as one command that can be stopped."""
