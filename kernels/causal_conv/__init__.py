"""Short causal convolution kernels."""
