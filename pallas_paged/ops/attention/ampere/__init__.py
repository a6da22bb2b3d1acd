"""Attention for compute capability 8.0, 8.6 and 8.9: one kernel for every step.

Written with what sm_80 has, which sm_86 and sm_89 have too.
"""
