"""Text from a model: KV caches, greedy and sampled decoding, stop rules."""
