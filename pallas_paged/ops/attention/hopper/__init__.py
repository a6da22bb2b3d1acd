"""Attention for compute capability 9.0 (H100, H200), sm_90a: decode, and ragged prefill."""
