"""Benchmarks, one a file: `experiments/run.py bench`."""
