"""Where things are in a model, and running and observing one block."""
