"""Speed and memory, measured against the libraries that users would pick instead. Nothing here is imported by tests."""
