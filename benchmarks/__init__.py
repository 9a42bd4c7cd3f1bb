"""Speed and memory against the alternatives, side by side: ``python -m benchmarks``."""
