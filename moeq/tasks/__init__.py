"""Evaluation tasks: what they are, from rows to documents to metrics."""
