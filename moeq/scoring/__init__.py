"""What a model says of given text: likelihoods, their divergence from an original, and how batches are laid out."""
