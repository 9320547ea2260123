"""A host's copy of a run: the training state, the estimator that the settings choose, and the update."""
