"""Figures from what was measured: texts, choices, intervals and summaries over clients.

Only `measure` and `questions` run a model, through `LocalModel`; nothing here reads a file.
"""
