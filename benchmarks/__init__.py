"""Programs that measure; each prints its figures, and `--help` says what it takes."""
