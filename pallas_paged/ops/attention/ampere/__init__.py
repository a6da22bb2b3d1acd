"""Attention for compute capability 8.0 (A100), sm_80: one kernel for every step."""
