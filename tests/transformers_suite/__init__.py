"""transformers' own tests of models, run on hybrids beside their teachers: `make test-transformers`."""
