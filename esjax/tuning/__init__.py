"""Sweeps over settings, and the choice of sigma by the cosine with the exact gradient."""
