"""What a model says of given text: log-likelihoods, divergence from an original, routing."""
