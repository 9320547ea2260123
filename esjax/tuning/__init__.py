"""Sweeps over settings, and the choice of sigma by the gradient's cosine."""
