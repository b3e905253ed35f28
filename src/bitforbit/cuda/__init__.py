"""Kernels for NVIDIA GPUs: CUDA C++ texts, compiled at first use for the GPU at hand, and what launches them.

No torch here: device memory comes in as addresses, streams as handles. Every kernel is a file in ``kernels/`` that
needs no header of the CUDA toolkit; a module of this package describes its arguments and chooses its launch
configuration.
"""
