"""Cases as data, oracles, acceptance and measurement, shared by tests and benchmarks."""
