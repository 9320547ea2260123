"""What hosts send for the pairs that they scored, how the coordinator combines it, and updates as bytes."""
