"""Kernels of the rotary embedding of one token's queries and keys."""
