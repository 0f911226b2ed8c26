"""A training step as an ordered list of updates, and its derivative (theory, sections 1 to 3)."""
