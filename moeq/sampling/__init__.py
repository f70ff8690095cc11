"""Calibration data that the model writes itself (EBSS), and windows of text."""
