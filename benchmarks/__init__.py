"""Speed and memory, measured against the libraries that users would pick instead: `python -m benchmarks`."""
