"""Regions: a decoder's attention modules as small graphs, cut out, printed, and stitched back."""
