"""Blocks: modules that take plain numbers, one layer a file."""
