"""Run folders: layout, checkpoints, ledger, and readers."""
