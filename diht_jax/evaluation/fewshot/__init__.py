"""Few-shot linear probing from prompts."""
