"""Rewards in plain Python: prompts, text that members write after them, and processes that score it."""
