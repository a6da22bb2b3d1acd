"""Attention for compute capability 10.0 (B200), sm_100a: one kernel for every step."""
