"""Figures from what was measured: texts, choices, intervals and summaries over clients.

Only `measure` runs a model, through `LocalModel`; nothing here reads a file.
"""
