"""Descriptions of GPUs to compile for: text protos of XLA's GPU target config, public figures.

Multiprocessors, clocks, caches and bandwidths are those of NVIDIA's data sheets and architecture
white papers; limits of threads, registers and shared memory those of the CUDA programming guide's
table of compute capabilities. The memory is what CUDA shows of the chip's, rounded down, where the
driver keeps some (A10, L4, L40S, RTX). The B200's are those of XLA's own description of it.
"""
