"""Benchmarks: ratios against a peer in one run, medians, one thread, peak memory in fresh processes."""
