"""Answers to right or wrong, to counts, to estimates with intervals: text and NumPy, no JAX."""
