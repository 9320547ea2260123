"""The loop that trains on one machine."""
