"""Linear attention kernels (linear, gated, delta and gated delta rule)."""
