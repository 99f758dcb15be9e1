"""Figures from what was measured: texts, choices, intervals and summaries over clients.

Nothing here runs a model or reads a file.
"""
