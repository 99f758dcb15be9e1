"""Measurements against what a user would otherwise run: `make bench` prints one table and writes bench/latest.json.

Timings on shared machines drift. So a figure is a ratio within one run: A and B take turns, and the median of the
repeats counts. The test suite times nothing here.
"""
