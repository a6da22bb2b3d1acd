"""The client of `benchmarks.serving`: sends requests to servers and times their streams."""
