"""Progress, trackers, metrics and plots of runs."""
