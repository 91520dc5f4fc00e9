"""Kernels of what q, k and v of linear heads go through before their recurrence."""
