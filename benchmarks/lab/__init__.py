"""The laboratory: tests the paper's claims at a small scale, with seeds and controls."""
