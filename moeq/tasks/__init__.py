"""Evaluation: what is computed from logits, and the metrics that reduce it."""
