"""Weights in files for other programs, out and in."""
