"""What happened at each step of a training run: kept, replayed and proven."""
