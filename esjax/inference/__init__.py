"""Loaded runs: generation and evaluation of text."""
