"""One program for whenever a GPU is at hand: is everything right on it, and how fast is it?

See `benchmarks/gpu_suite/__main__.py`.
"""
