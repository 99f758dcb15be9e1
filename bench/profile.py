"""Shares of kinds of operations in the time of a pass, by torch's profiler, on one thread."""

from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

KINDS = {
    "products of layers": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot_product"),
    "dropout's masks": ("aten::bitwise_and", "aten::ge", "aten::neg"),
    "copies and casts": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index"),
    "elementwise": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::silu", "aten::exp", "aten::rsqrt"),
    "reductions": ("aten::sum", "aten::amax", "aten::linalg_vector_norm", "aten::log"),
}
"""Kinds of operations, by the beginnings of their names; the first that fits counts."""


def shares(work: Callable[[], object]) -> dict[str, float]:
    """The share of each kind of operation in the time of all; the rest is "other"."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        spent[_kind(event.key)] += event.self_cpu_time_total
    return {kind: round(value / spent.total(), 3) for kind, value in spent.most_common()}


def _kind(name: str) -> str:
    fits = (kind for kind, begins in KINDS.items() if name.startswith(begins))
    return next(fits, "other")
