"""Files for llama.cpp, vLLM, MLX and GPTQModel, made of a packed export and read back."""
