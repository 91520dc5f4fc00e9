"""`hydra::head_inputs`: kernels."""
