"""A miniature teacher that retrieves, and what it was trained on."""
