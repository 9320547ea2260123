"""A host's copy of a run: its state, the estimator that its settings choose, and the update."""
