"""Benchmarks: real processes on this machine, every figure beside the baselines of the same run."""
