"""The sweep of a setting: methods at several of its values, on several seeds.

Its results are the response NLL's mean over clients and that of the worst client, as figures and a picture.

    OUT/KNOB/sweep.json   sweep.svg
        runs/NAME/KNOB=VALUE-seed-S/    one run folder per run
                  as-set-seed-S/        at the configuration's own value: one for all settings

A name is a method's or a variant's. All values have the budget of local steps of the unchanged configuration
(`entrants`), unless the setting is part of the budget. Runs are handled as in a comparison: complete runs are kept,
stopped runs are resumed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmide.atomic import to_json, write_file
from fedmide.config import apply_overrides, parse
from fedmide.config.knobs import fingerprint, for_method
from fedmide.errors import UsageError
from fedmide.journal.creation import locked, reopen
from fedmide.progress import Progress, Tell, quiet, silent
from fedmide.studies.attempts import Attempt, Work
from fedmide.studies.curves import Point, curves_svg
from fedmide.studies.entrants import BUDGET, Entrant, budget_of, check_names, settings, within

METRICS = {"response_nll": "mean", "response_nll_worst": "worst"}
"""The shown figures of a run, and their names among the figures over clients."""


_VALUE = re.compile(r"[A-Za-z0-9._:+-]+")


@dataclass(frozen=True)
class Sweep:
    """A setting, its values as given, and the configuration of each method or variant at each value.

    `as_set`: the fingerprint of the unchanged configuration of each method or variant.
    """

    out: Path
    knob: str
    values: tuple[str, ...]
    entrants: Mapping[str, tuple[Entrant, ...]]
    as_set: Mapping[str, str]
    seeds: tuple[int, ...]

    @property
    def folder(self) -> Path:
        """The folder of the setting's figures and their picture."""
        return self.out / self.knob

    @property
    def num_runs(self) -> int:
        """The number of all runs."""
        return len(self.entrants) * len(self.values) * len(self.seeds)

    def attempt(self, name: str, place: int, seed: int) -> Attempt:
        """The run of a method or a variant at one of the values."""
        entrant = self.entrants[name][place]
        turned = fingerprint(entrant.config) != self.as_set[name]
        label = f"{self.knob}={self.values[place]}" if turned else "as-set"
        path = self.out / "runs" / name / f"{label}-seed-{seed}"
        return Attempt(entrant, entrant.config.training.learning_rate, seed, path)


def planned(values: Mapping[str, Any], turned: str, names: Sequence[str], seeds: Sequence[int], out: Path) -> Sweep:
    """The sweep for `KNOB=VALUE,VALUE,...`, names and seeds; every configuration is checked."""
    knob, _, given = (each.strip() for each in turned.partition("="))
    texts = [each.strip() for each in given.split(",")]
    if not knob or len(set(texts)) < len(texts) or not all(_VALUE.fullmatch(each) for each in texts):
        raise UsageError(f"--knob {turned!r}: expected KNOB=VALUE,VALUE", "For example enrollment.threshold=0.9,1.0")
    check_names(values, names)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError("--seeds: expected numbers, each once", "For example --seeds 0,1,2")
    turns = {name: [_turned(values, name, f"{knob}={text}") for text in texts] for name in names}
    for each in turns.values():
        for text, settings_at in zip(texts, each, strict=True):
            parse(settings_at, f"{knob} = {text}")  # all of them before records are read
    whole = [apply_overrides(values, [f"{knob}={text}"]) for text in texts]
    budgets = [budget_of(each) for each in whole] if knob in BUDGET else [budget_of(values)] * len(texts)
    entrants: dict[str, tuple[Entrant, ...]] = {
        name: tuple(
            Entrant(title := f"{name}, {knob} = {text}", within(budget, settings_at, title), budget)
            for text, settings_at, budget in zip(texts, each, budgets, strict=True)
        )
        for name, each in turns.items()
    }
    if len(texts) > 1 and not any(_differ(each) for each in entrants.values()):
        raise UsageError(
            f"--knob {turned!r}: makes no difference to {', '.join(entrants)}, at least between two of the values",
            "Choose another setting, or other values",
        )
    as_set = {name: fingerprint(within(budget_of(values), settings(values, name), name)) for name in names}
    return Sweep(out, knob, tuple(texts), entrants, as_set, tuple(seeds))


def _turned(values: Mapping[str, Any], name: str, setting: str) -> dict[str, Any]:
    """The settings of a method or a variant at a value of the swept setting; a variant can't override the value."""
    own = settings(apply_overrides(values, [setting]), name)
    return for_method(apply_overrides(own, [setting]), str(own["method"]))


def _differ(entrants: Sequence[Entrant]) -> bool:
    """True if no two of the entrants would run alike."""
    return len({fingerprint(entrant.config_for(0)) for entrant in entrants}) == len(entrants)


def run(sweep: Sweep, tell: Tell = quiet, progress: Progress = silent) -> dict[str, Any]:
    """Makes every missing run, writes the figures and the picture, and returns the figures of sweep.json."""
    with locked(sweep.folder):
        work = Work(sweep.num_runs, tell, progress)
        for seed in sweep.seeds:
            for place in range(len(sweep.values)):
                for method in sweep.entrants:
                    work.run(sweep.attempt(method, place, seed), ["personalized"])
        figures = {
            "knob": sweep.knob,
            "seeds": list(sweep.seeds),
            "methods": {method: _rows(sweep, method) for method in sweep.entrants},
        }
        write_file(sweep.folder / "sweep.json", to_json(figures))
        write_file(sweep.folder / "sweep.svg", picture(figures).encode())
    return figures


def picture(figures: Mapping[str, Any]) -> str:
    """The sweep as SVG: a panel for the mean over clients and one for the worst, with deviations over seeds."""
    panels = {
        title: {
            method: [Point(value, row[metric]["mean"], row[metric]["deviation"]) for value, row in rows.items()]
            for method, rows in figures["methods"].items()
        }
        for metric, title in (("response_nll", "mean over clients"), ("response_nll_worst", "worst client"))
    }
    seeds = len(figures["seeds"])
    about = f"response NLL by {figures['knob']}; bars: standard deviation over {seeds} seeds" if seeds > 1 else ""
    return curves_svg(panels, figures["knob"], about or f"response NLL by {figures['knob']}, one seed")


def _rows(sweep: Sweep, method: str) -> dict[str, dict[str, Any]]:
    """Per value, each metric's mean, sample deviation, least and greatest over seeds; None if a run diverged."""
    rows: dict[str, dict[str, Any]] = {}
    for place, value in enumerate(sweep.values):
        by_seed = [_figures(sweep.attempt(method, place, seed)) for seed in sweep.seeds]
        rows[value] = {name: _over_seeds([each[name] for each in by_seed]) for name in by_seed[0]}
    return rows


def _figures(attempt: Attempt) -> dict[str, float | None]:
    """A run's figures; its NLLs are None if a client has no NLL that is a number."""
    folder = reopen(attempt.path, attempt.config)
    metrics = json.loads((folder.path / "metrics.json").read_text("utf-8"))
    measured = [client["stages"]["personalized"] for client in metrics["clients"].values()]
    has_diverged = any(each["num_not_finite"] and not each["num_records"] for each in measured)
    nll = {} if has_diverged else metrics["over_clients"]["personalized"]["response_nll"]
    shared = [client["sets"]["shared"] for client in metrics["clients"].values()]
    return {
        **{name: nll.get(key) for name, key in METRICS.items()},
        "steps_per_client": metrics["federation"]["steps"] / len(metrics["clients"]),
        "shared_at_the_end": float(np.mean(shared)),
    }


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample deviation, least and greatest; None if a value is None."""
    given = [each for each in values if each is not None]
    if len(given) < len(values):
        return {**dict.fromkeys(("mean", "deviation", "low", "high")), "seeds": len(values)}
    deviation = float(np.std(given, ddof=1)) if len(given) > 1 else None
    ends = {"low": min(given), "high": max(given), "seeds": len(given)}
    return {"mean": float(np.mean(given)), "deviation": deviation, **ends}
