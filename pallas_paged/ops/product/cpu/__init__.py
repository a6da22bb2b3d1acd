"""Products of few rows with a weight, for CPUs."""
