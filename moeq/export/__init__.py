"""Exports of a quantized model: writers and their verification."""
