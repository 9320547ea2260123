"""The training loop on one machine, and the replay of a run."""
