"""Checkpoints of other libraries, by declared tables: `table` says how, each other file is one library."""
