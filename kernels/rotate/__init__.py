"""Kernels of the rotary embedding of the full heads of one token."""
