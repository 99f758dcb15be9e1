"""Measurements against what a user would otherwise run: `make bench` prints one table and writes bench/latest.json.

Timings on shared machines drift, so a figure is a ratio within one run, A and B in turn, medians of repeats. Nothing
here is timed in the test suite.
"""
