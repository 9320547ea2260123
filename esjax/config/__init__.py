"""Settings: typed, named, read from files, and what is said of wrong ones."""
