"""Kernels for NVIDIA GPUs in Triton, under the names of the ops; imported where Triton is installed (``kernels.gpu``).

Time is contiguous in what they write: a program then has one channel, and its blocks of time are matrices.
"""
