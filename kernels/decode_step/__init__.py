"""One token of a layer's linear heads, from short convolution to output gate."""
