"""The report: a run folder read into facts, drawn as figures, written as one page.

`write` is what the command line calls. Nothing here imports torch, and nothing changes a run.
"""

from fedmide.report.write import compare, write

__all__ = ["compare", "write"]
