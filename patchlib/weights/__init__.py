"""Everything between a name and a filled model."""
