"""What the kernels for CPUs share: calls from XLA, and the threads that work on one together."""
