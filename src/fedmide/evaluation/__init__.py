"""Evaluation: figures from measured NLLs and texts, intervals, and summaries over clients.

Only `measure` and `questions` run a model, through `LocalModel`. Nothing here reads a file.
"""
