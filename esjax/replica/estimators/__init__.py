"""Estimators: how a step gets its estimate of the gradient, and what hosts exchange for it."""
