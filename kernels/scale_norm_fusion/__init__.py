"""Kernels that normalise linear heads and put every head in its own slot."""
