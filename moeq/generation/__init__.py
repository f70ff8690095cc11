"""What a model writes: decoding in batches, greedy or sampled."""
