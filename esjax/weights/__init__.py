"""Export and import of weights as files."""
