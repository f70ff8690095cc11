"""Calibration data and what is observed on it."""
