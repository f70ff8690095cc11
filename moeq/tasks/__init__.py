"""Evaluation tasks: what they are, from rows to documents, and from documents to metrics and records."""
