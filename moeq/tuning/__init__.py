"""A whole quantized model learns what the original predicts."""
