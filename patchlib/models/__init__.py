"""Models: one architecture a file, read downward."""
