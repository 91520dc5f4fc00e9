"""What hybrids need while they generate."""
