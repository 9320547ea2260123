"""Benchmarks, one per file: `experiments/run.py bench`."""
