"""Modules that compute with packed weights."""
