"""End-to-end tuning: what is left free in a quantized model learns to predict what the original predicts."""
