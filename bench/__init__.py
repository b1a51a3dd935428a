"""Benchmarks of the runtime, each a command: `python -m runtime.bench.<name>`."""
