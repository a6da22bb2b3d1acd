"""The clients of `benchmarks.soak`: what they ask for, and how they behave."""
