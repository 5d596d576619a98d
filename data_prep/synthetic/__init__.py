"""The synthetic web of the demo: scenes, captions, noise, and a teacher for it."""
