"""One's own training loop as a recorded run: watched, or by its objectives, and proven by replay."""
