"""Weight import and export: files and layouts of other CLIPs, and the released DiHT models."""
