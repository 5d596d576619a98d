"""The synthetic noisy web of the demo: scenes, captions, noise, and an image teacher."""
