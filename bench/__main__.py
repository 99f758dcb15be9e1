"""Measures all of it, prints one table and writes bench/latest.json."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import profile
from bench.ours import Federation, timed_work
from bench.stock import Stock
from bench.timing import alternating, figure, once, ratios, seconds
from bench.workload import Workload, workload
from fedmide.data.tokens import Example
from fedmide.evaluation.measure import measure
from fedmide.federation.client import handle
from fedmide.federation.messages import ClientTask
from fedmide.model import adapters, devices, generation, scoring, training
from fedmide.model.interface import TrainingPlan
from fedmide.model.lora import load
from fedmide.model.pretrained.locate import locate
from fedmide.runs import opening, stages
from fedmide.runs.resident import Kept

ROUNDS = 3
"""Repeats of a whole round; the stock round takes most of the time."""

TURNS = 3
"""Turns of scoring, training and the peak, after a first one that does not count."""

AGREEMENT = 1e-3
"""The most nats per token by which the results of the two may differ."""

Figures = dict[str, Any]
TARGETS = {
    "round_speedup_as_run": ">= 4",
    "round_speedup_equal_precision": ">= 1.7",
    "scoring_share_of_peak": ">= 0.65",
    "training_share_of_peak": ">= 0.50",
    "prefix_cache_round_speedup": ">= 10",
    "generation_speedup": ">= 5",
    "overhead_share": "<= 0.03",
    "adapter_swap_ms": "<= 5",
    "help_seconds": "<= 0.3",
    "model_load_seconds": "<= 2",
    "memory_ratio_64_to_8_clients": "<= 1.05",
    "client_round_overhead_ms": "<= 2",
}


def main() -> None:
    """Runs the measurements of `make bench` in order, or those whose names contain one of the given words."""
    console, wanted = Console(stderr=True), sys.argv[1:]
    path = Path(__file__).parent / "latest.json"
    found: Figures = json.loads(path.read_text()) if wanted and path.exists() else {}
    if any(found.get(name) != value for name, value in _facts().items() if name != "date"):
        found = {}  # figures of another commit or machine do not belong in one table with these
    for name, part in MEASURES.items():
        is_wanted = any(word in name for word in wanted) if wanted else name not in ASKED_FOR
        if not is_wanted:
            continue
        console.print(f"bench: {name}")
        begun = time.perf_counter()
        for figures in part():
            found |= _facts() | figures
            path.write_text(json.dumps(found, indent=2) + "\n")
        console.print(f"bench: {name} took {time.perf_counter() - begun:.0f} s")
    Console(width=110).print(_table(found))


def _facts() -> Figures:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
    }


@dataclass(frozen=True)
class Products:
    """Products in the model's shapes, layer after layer as in a pass, so that no weight is still in the cache."""

    given: list[torch.Tensor]
    weights: list[list[torch.Tensor]]

    def __call__(self) -> None:
        """Computes all products once."""
        for layer in self.weights:
            for one, weight in zip(self.given, layer, strict=True):
                torch.nn.functional.linear(one, weight)

    @property
    def operations(self) -> float:
        """Billions of multiplications and additions."""
        return 2 * len(self.given[0]) * sum(weight.numel() for layer in self.weights for weight in layer) / 1e9


def fastest_products(work: Workload, dtype: torch.dtype) -> Products:
    """The products with the number of rows that gives the most operations per second."""
    config = _network_config(work)
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(config.num_hidden_layers)]
    tried = [
        Products([torch.randn(rows, shape[1]).to(dtype) for shape in shapes], weights) for rows in (512, 1024, 2048)
    ]
    return max(tried, key=lambda each: each.operations / statistics.median(seconds(each, 3)))


def shares() -> Iterator[Figures]:
    """Scoring and training as a share of the peak in the model's type: necessary operations, divided by time.

    The peak takes turns with both, and each share is relative to the peak of the same turn.
    """
    work = workload()
    examples = _examples(work)
    types = sorted({torch.float32, _own_type()}, key=str)
    products = {_peak_name(dtype): fastest_products(work, dtype) for dtype in types}
    model, config = work.inputs.resident.model, work.config
    model.put(work.inputs.fresh_adapter())
    plan = TrainingPlan(config.training, 0, 0, "bench")
    needed = {"scoring_share_of_peak": 2, "training_share_of_peak": 4}
    works = {
        "scoring_share_of_peak": lambda: scoring.nll(model, examples, "response", config.scoring.tokens_per_batch),
        "training_share_of_peak": lambda: list(training.train(model, examples, plan)),
    }
    tokens = sum(len(example.ids) for example in examples)
    runs = {name: each[1:] for name, each in alternating({**products, **works}, TURNS + 1).items()}
    peaks = {name: [each.operations / run for run in runs[name]] for name, each in products.items()}
    found = {name: figure(each, 0) for name, each in peaks.items()}
    for name in works:
        operations = needed[name] * _operations(work, examples) / 1e9
        top = peaks[_peak_name(_own_type())]
        found[name] = figure([operations / run / best for run, best in zip(runs[name], top, strict=True)])
        found[name.replace("share_of_peak", "tokens_per_second")] = figure([tokens / run for run in runs[name]], 0)
    yield found


def profiles() -> Iterator[Figures]:
    """The shares of kinds of operations in the time of scoring and training."""
    work = workload("runtime.threads=1")
    model, examples, config = work.inputs.resident.model, _examples(work), work.config
    model.put(work.inputs.fresh_adapter())
    plan = TrainingPlan(config.training, 0, 0, "bench")
    yield {
        "scoring_profile": profile.shares(
            lambda: scoring.nll(model, examples, "response", config.scoring.tokens_per_batch)
        ),
        "training_profile": profile.shares(lambda: list(training.train(model, examples, plan))),
    }


def rounds() -> Iterator[Figures]:
    """A whole round against the stock round: as a user would run that, at equal precision, with cached prefixes."""
    pairs = {
        "round_speedup_as_run": ((), torch.float32),
        "round_speedup_equal_precision": ((), _own_type()),
        "round_speedup_float32": (("model.dtype=float32",), torch.float32),
        "prefix_cache_round_speedup": (("lora.blocks=top:8",), torch.float32),
    }
    known: dict[tuple[torch.dtype, torch.dtype, str], dict[str, list[float]]] = {}
    for name, (overrides, dtype) in pairs.items():
        work = workload(*overrides)
        kind = (work.inputs.resident.model.dtype, dtype, work.config.lora.blocks)
        stock = Stock(locate("smollm2-135m"), work.config, dtype)
        if kind not in known:  # if the model's own type is float32, three of the pairs are the same
            records = {client: each.training for client, each in work.inputs.clients.items()}
            federation = Federation(work)
            federation.round()  # fills the caches
            stock.round({client: each[:4] for client, each in records.items()})
            contest = {"stock": lambda: stock.round(records), "ours": federation.round}  # noqa: B023
            known[kind] = alternating(contest, ROUNDS)
        runs = known[kind]
        yield {
            name: figure(ratios(runs["stock"], runs["ours"]), 2),
            f"{name}_seconds": {key: figure(value, 2) for key, value in runs.items()},
        }


def agreement() -> Iterator[Figures]:
    """The differences between ours and stock after one local training of the same adapter, both in float32.

    All records form one step of the optimizer, so that their order does not matter. Too large a difference ends the
    bench.
    """
    work = workload("model.dtype=float32", "lora.dropout=0")
    name, client = next(iter(work.inputs.clients.items()))
    records, examples = client.training, work.inputs.examples[name].training
    resident, fresh = work.inputs.resident, work.inputs.fresh_adapter()
    draw = np.random.default_rng(0)
    start = {key: array + draw.normal(0, 0.01, array.shape).astype(np.float32) for key, array in fresh.items()}
    plan = TrainingPlan(work.config.training, 0, 0, "bench")
    stock = Stock(locate("smollm2-135m"), work.config, torch.float32)
    network = stock.network({key: torch.from_numpy(array) for key, array in start.items()})
    before = resident.nll(start, examples, "response"), stock.nlls(network, records)
    ours = list(resident.train(start, examples, plan))[-1]
    with tempfile.TemporaryDirectory() as folder:
        theirs = stock.train(network, records, Path(folder))
    after = resident.nll(ours.adapter, examples, "response"), stock.nlls(network, records)
    found = {
        "nll_difference": max(abs(one.mean - two) for one, two in zip(*before, strict=True)),
        "training_loss_difference": abs(ours.loss.mean - theirs),
        "trained_nll_difference": max(abs(one.mean - two) for one, two in zip(*after, strict=True)),
    }
    yield found
    if max(found.values()) > AGREEMENT:
        sys.exit(f"bench: ours and stock do not agree: {found}")


def overhead() -> Iterator[Figures]:
    """Overhead of a run's warm-up and one round: everything but forward, backward and optimizer, with all writing."""
    work = workload("federation.rounds=1", "warmup.rounds=1", "model.dtype=auto")
    opened = Kept()
    shares_of: list[float] = []
    for _ in range(4):
        with (
            tempfile.TemporaryDirectory() as folder,
            opening.start(work.config, Path(folder) / "run", opener=opened) as run,
            timed_work(run.inputs.resident.model) as busy,
        ):
            whole = once(partial(stages.train, run))
        shares_of.append(1 - busy.seconds / whole)
    yield {"overhead_share": figure(shares_of[1:], 4)}


def generated() -> Iterator[Figures]:
    """Tokens per second: our batches against transformers' greedy `generate` under PEFT, every fourth prompt alone."""
    work = workload()
    model, longest = work.inputs.resident.model, 32
    model.put(work.inputs.fresh_adapter())
    examples = [example for site in work.inputs.examples.values() for example in site.test][:32]
    records = [record for site in work.inputs.clients.values() for record in site.test][:32:4]
    stock = Stock(locate("smollm2-135m"), work.config, model.dtype)
    network = stock.network({})
    counts: dict[str, int] = {}

    def together() -> None:
        texts = generation.generate(model, examples, longest, 32)
        counts["together"] = sum(len(model.tokenizer(text)["input_ids"]) for text in texts)

    def alone() -> None:
        counts["alone"] = sum(stock.generate(network, record, longest) for record in records)

    runs = alternating({"together": together, "alone": alone}, 3)
    speeds = {name: [counts[name] / each for each in runs[name]] for name in runs}
    yield {
        "generation_speedup": figure(ratios(speeds["together"], speeds["alone"]), 2),
        "generation_tokens_per_second": {name: figure(each, 1) for name, each in speeds.items()},
    }


def parts() -> Iterator[Figures]:
    """Times of adapter swap, codec and start-up."""
    work = workload()
    model, adapter = work.inputs.resident.model, work.inputs.fresh_adapter()
    data = adapters.encode(adapter)
    folder, config = locate("smollm2-135m"), work.config
    help_command = [sys.executable, "-m", "fedmide", "--help"]
    yield {
        "adapter_swap_ms": figure([1e3 * each for each in seconds(lambda: model.put(adapter), 20)]),
        "adapter_encode_ms": figure([1e3 * each for each in seconds(lambda: adapters.encode(adapter), 20)]),
        "adapter_decode_ms": figure([1e3 * each for each in seconds(lambda: adapters.decode(data), 20)]),
        "adapter_bytes": len(data),
        "help_seconds": figure(seconds(lambda: subprocess.run(help_command, capture_output=True, check=True), 5)),
        "model_load_seconds": figure(seconds(lambda: load(folder, config.model, config.lora), 3)),
    }


def stages_alone() -> Iterator[Figures]:
    """Personalization and evaluation of one client, in tokens and records per second."""
    work = workload()
    inputs, config = (
        work.inputs,
        work.config.model_copy(
            update={"personalization": work.config.personalization.model_copy(update={"epochs": 1})}
        ),
    )
    name, site = next(iter(Federation(work).sites().items()))
    task = ClientTask(site.federation, name, config.federation.rounds, inputs.fresh_adapter(), False, False)
    state = replace(site, config=config)
    tokens = sum(len(example.ids) for example in state.training.values())
    client = inputs.clients[name]
    tuned = seconds(lambda: handle(task, state, inputs.resident), 3)
    measured = seconds(lambda: measure(inputs.resident, task.adapter, inputs.encode, client, config), 3)
    yield {
        "personalization_tokens_per_second": figure([tokens / each for each in tuned], 0),
        "evaluated_records_per_second": figure([len(client.test) / each for each in measured], 2),
    }


def growth() -> Iterator[Figures]:
    """Time per record and peak memory with 1,000 and 4,000 records, tiny model, 8 clients."""
    found = {count: _tiny_run(8, 1, count // 8) for count in (1000, 4000)}
    yield {
        "seconds_per_1000_records": {str(count): each["seconds"] * 1000 / count for count, each in found.items()},
        "memory_mb_by_records": {str(count): each["peak_memory_mb"] for count, each in found.items()},
    }


def many() -> Iterator[Figures]:
    """Peak memory with 64 clients against 8, and the overhead of a client round, without model work, with 1,000."""
    runs = [{count: _tiny_run(count, 1) for count in (8, 64, 1000)} for _ in range(3)]
    peaks = {count: [run[count]["peak_memory_mb"] for run in runs] for count in (8, 64, 1000)}
    yield {
        "memory_ratio_64_to_8_clients": figure(ratios(peaks[64], peaks[8])),
        "memory_ratio_1000_to_8_clients": figure(ratios(peaks[1000], peaks[8])),
        "memory_mb_by_clients": {str(count): figure(each, 0) for count, each in peaks.items()},
        "client_round_overhead_ms": figure([run[1000]["overhead_ms"] for run in runs]),
        "client_round_overhead_ms_of_64": figure([run[64]["overhead_ms"] for run in runs]),
    }


MEASURES = {
    "peak, scoring and training": shares,
    "profile": profiles,
    "start-up, adapter swap, codec": parts,
    "generation": generated,
    "what is not the model": overhead,
    "personalization and evaluation": stages_alone,
    "many records": growth,
    "many clients": many,
    "agreement": agreement,
    "whole rounds": rounds,
}

ASKED_FOR = ("profile",)
"""Measurements that run only if their name is given: they compare nothing, and take minutes."""


def _own_type() -> torch.dtype:
    """The type that the model has on this machine if none is set."""
    return devices.dtype("auto", torch.device("cpu"))


def _peak_name(dtype: torch.dtype) -> str:
    return f"peak_{str(dtype).removeprefix('torch.')}_gflops"


def _examples(work: Workload) -> list[Example]:
    return [example for site in work.inputs.examples.values() for example in site.training]


def _operations(work: Workload, examples: list[Example]) -> float:
    """Multiplications of one product of each weight and token, including attention over the tokens before it."""
    config = _network_config(work)
    decoder = work.inputs.resident.model.prefixes.decoder  # type: ignore[union-attr]
    block = sum(layer.weight.shape[0] * layer.num_in for layer in _layers(decoder))
    lengths = np.array([len(example.ids) for example in examples])
    labels = sum(example.num_predicted("response") for example in examples)
    attention = config.num_hidden_layers * config.hidden_size * float((lengths**2).sum())
    return float(lengths.sum() * block + labels * decoder.head.numel() + attention)


def _network_config(work: Workload) -> Any:
    """The sizes of the base model, from its transformers configuration."""
    return work.inputs.resident.model.network.get_base_model().config


def _layers(decoder: Any) -> list[Any]:
    names = ("query_key_value", "attention_out", "gate_up", "down")
    return [getattr(block, name) for block in decoder.blocks for name in names]


def _tiny_run(num_clients: int, num_rounds: int, num_records: int = 4) -> dict[str, float]:
    """The figures of a run of the tiny model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.tiny", str(num_clients), str(num_rounds), str(num_records), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        values: dict[str, float] = json.loads(done.stdout)
        return values


def _table(found: Figures) -> Table:
    table = Table(title="fedmide against what a user would otherwise run", box=box.SIMPLE_HEAD)
    for column in ("figure", "value", "aim", "runs"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name in sorted(set(found) - set(_facts()), key=lambda name: ([*TARGETS, name].index(name), name)):
        given = found[name]
        if isinstance(given, dict) and "runs" in given:
            runs = ", ".join(f"{each:g}" for each in given["runs"][:5])
            table.add_row(name, f"{given['value']:g}", TARGETS.get(name, ""), runs)
        elif isinstance(given, int | float):
            table.add_row(name, f"{given:g}", "", "")
    return table


def _processor() -> str:
    capabilities = torch.cpu.get_capabilities()
    kinds = [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]
    return f"{os.cpu_count()} cores, {', '.join(kinds) or 'no bfloat16 products'}"


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
