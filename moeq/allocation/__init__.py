"""Which weight gets how many bits."""
