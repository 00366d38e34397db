"""Triton kernels for NVIDIA GPUs, each in one file with its launch; `run.py` says which of them run."""
