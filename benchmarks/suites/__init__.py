"""Suites of benchmarks, one module each, with a function `run` as `benchmarks.core.Suite` says."""

#: In the order in which they run.
SUITES = (
    "complexity",
    "scaling",
    "alternatives",
    "limits",
    "cam",
    "cam_memory",
    "recompute",
    "softmax",
    "linear",
    "head",
    "network",
    "network_training",
    "network_compiled",
    "network_scaling",
)
