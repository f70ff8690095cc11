"""Tests of moeq; the folders follow the tree of the project."""
