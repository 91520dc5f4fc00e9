"""Kernels of the gates of linear heads."""
