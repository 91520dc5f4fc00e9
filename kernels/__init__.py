"""Kernels, one folder per op: `reference` is plain PyTorch on any device; faster ones stand beside it."""
