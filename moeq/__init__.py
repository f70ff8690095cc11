"""moeq: post-training quantization of Mixture-of-Experts language models."""
