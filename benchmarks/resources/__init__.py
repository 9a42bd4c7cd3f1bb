"""Registers, spills and instructions of compiled GPU kernels: the tables in `docs`."""
