"""What attention is tested and timed on: named arguments, and configurations of its kernels."""
