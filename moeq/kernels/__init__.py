"""Matrix products and kernels on raw tensors, each with a plain twin in torch."""
