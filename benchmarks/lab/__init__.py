"""The laboratory: which of the paper's claims hold in the small, with seeds and controls."""
