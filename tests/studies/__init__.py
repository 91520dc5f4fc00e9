"""Studies: scripts that measure what docs/selection.md reports; each prints its table."""
