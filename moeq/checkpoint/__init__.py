"""Opening a model, names of its weights, and the packed format with its modules."""
