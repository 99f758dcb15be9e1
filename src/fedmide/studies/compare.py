"""The comparison of methods: every missing run, then one folder with their figures and differences.

    OUT/comparison.json   comparison.md   comparison.html
        runs/NAME/rate-R-seed-S/     one run folder per run

All runs have the same records, whatever their seed, and the same budget of local steps (`entrants`).
If several learning rates are given, each entrant's is chosen on the first seed: the one with the lowest response NLL of
the validation records, mean over clients. Test records under the other rates are never measured.
A complete run is not repeated, and a stopped run is resumed. The base model is loaded once.
Runs that differ only in their tuning share the same rounds, unless they tune different adapters
(`personalization.start`).

If only validation records are used, the folder gets `validation.json` and `validation.md` instead. Settings are
chosen by these, and the test records of the same runs may be measured later.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmide import methods
from fedmide.atomic import to_json, write_file
from fedmide.config import Config
from fedmide.errors import RunFolderError, UsageError
from fedmide.evaluation.measure import Measured
from fedmide.evaluation.summary import StageName
from fedmide.journal.creation import locked, reopen
from fedmide.journal.folder import RunFolder
from fedmide.progress import Progress, Tell, quiet, silent
from fedmide.studies.attempts import SAME_INPUTS, Attempt, Work
from fedmide.studies.comparison_figures import RunOutcome, compare
from fedmide.studies.entrants import BASE, Budget, Entrant, entrants
from fedmide.studies.tables import mean_of_all, sheets, to_html, to_markdown, validation_sheet
from fedmide.version import __version__

AGAINST = ("fedavg-ft", "fedmide")
"""The methods that all others are compared with by default."""


@dataclass(frozen=True)
class Plan:
    """A planned comparison: the entrants on these seeds, each with one of these learning rates.

    Without `rates`, each entrant has the rate of its configuration.
    """

    out: Path
    entrants: tuple[Entrant, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    against: tuple[str, ...]
    validation_only: bool = False

    def attempt(self, entrant: Entrant, rate: float, seed: int) -> Attempt:
        """The run of an entrant with a rate and a seed."""
        return Attempt(entrant, rate, seed, self.out / "runs" / entrant.name / f"rate-{rate!r}-seed-{seed}")

    def rates_of(self, entrant: Entrant) -> tuple[float, ...]:
        """The learning rates that an entrant is tried with."""
        return self.rates or (entrant.config.training.learning_rate,)

    @property
    def budget(self) -> Budget:
        """The budget that all entrants share."""
        return self.entrants[0].budget

    @property
    def num_runs(self) -> int:
        """The number of all runs."""
        return len(self.entrants) * (max(1, len(self.rates)) + len(self.seeds) - 1)


def planned(
    values: Mapping[str, Any],
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    rates: Sequence[float] = (),
    against: Sequence[str] | None = None,
    validation_only: bool = False,
) -> Plan:
    """The comparison of these methods, seeds and learning rates; all problems are reported before any run.

    `against` are the names that the others are compared with; None: those of `AGAINST` that take part.
    """
    for what, given in (("seeds", seeds), ("learning-rates", rates)):
        if len(set(given)) < len(given) or (what == "seeds" and not given) or any(each < 0 for each in given):
            raise UsageError(f"--{what}: expected numbers, none below 0, each once", f"For example --{what} 0,1,2")
    found = entrants(values, names)
    held = tuple(each for each in AGAINST if each in names) if against is None else tuple(against)
    if unknown := [each for each in held if each not in names]:
        raise UsageError(
            f"--against: {', '.join(unknown)} is not one of the compared methods", f"Name some of {', '.join(names)}"
        )
    return Plan(out, found, tuple(seeds), tuple(rates), held, validation_only)


def run(plan: Plan, tell: Tell = quiet, progress: Progress = silent) -> dict[str, Any]:
    """Makes every missing run, writes the tables, and returns the figures of comparison.json or validation.json."""
    with locked(plan.out):
        work = Work(plan.num_runs, tell, progress)
        chosen = {
            entrant.name: _chosen(work, plan, entrant, number == 0) for number, entrant in enumerate(plan.entrants)
        }
        attempts = {
            entrant.name: {seed: plan.attempt(entrant, chosen[entrant.name]["rate"], seed) for seed in plan.seeds}
            for entrant in plan.entrants
        }
        for seed in plan.seeds[1:]:
            for entrant in plan.entrants:
                work.run(attempts[entrant.name][seed], () if plan.validation_only else ["personalized"])
        if plan.validation_only:
            figures = _validation_figures(plan, attempts, chosen)
            write_file(plan.out / "validation.json", to_json(figures))
            write_file(plan.out / "validation.md", to_markdown([validation_sheet(figures)]).encode())
            return figures
        figures = _figures(plan, attempts, chosen)
        write_file(plan.out / "comparison.json", to_json(figures))
        tables = sheets(figures)
        write_file(plan.out / "comparison.md", to_markdown(tables).encode())
        write_file(plan.out / "comparison.html", to_html(tables).encode())
    return figures


def _chosen(work: Work, plan: Plan, entrant: Entrant, first: bool) -> dict[str, Any]:
    """The entrant's learning rate, chosen on the first seed, and the validation NLL of each tried rate.

    The test records of the chosen run are then measured, unless the plan is for validation records only.
    """
    attempts = [plan.attempt(entrant, rate, plan.seeds[0]) for rate in plan.rates_of(entrant)]
    validations: dict[float, float | None] = {}
    if len(attempts) > 1:
        for attempt in attempts:
            work.run(attempt, ())
            validations[attempt.rate] = mean_of_all(_validation(attempt).values())
        finite = {rate: value for rate, value in validations.items() if value is not None}
        if not finite:
            raise RunFolderError(
                f"{plan.out / 'runs' / entrant.name}: the validation NLL is not a number under any learning rate",
                "Set data.validation_fraction above 0, or other --learning-rates",
            )
        rate = min(finite, key=lambda each: finite[each])
        attempts = [attempt for attempt in attempts if attempt.rate == rate]
    wanted: list[StageName] = ["base", "personalized"] if first else ["personalized"]
    work.run(attempts[0], () if plan.validation_only else wanted)
    tried = [{"rate": rate, "validation_nll": value} for rate, value in validations.items()]
    return {"rate": attempts[0].rate, "tried": tried}


def _validation(attempt: Attempt) -> dict[str, float | None]:
    """Response NLL of each client's validation records; None if it is not a number.

    Clients without validation records are left out.
    """
    clients = json.loads((attempt.path / "validation.json").read_text("utf-8"))
    return {
        name: None if each["sum"] is None else each["sum"] / each["num_tokens"]
        for name, each in clients.items()
        if each["num_tokens"]
    }


def _validation_figures(
    plan: Plan, attempts: Mapping[str, Mapping[int, Attempt]], chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of validation.json: per seed, each method's mean over clients and its worst client."""
    folders = [reopen(attempt.path, attempt.config) for runs in attempts.values() for attempt in runs.values()]
    _check_same_inputs(plan.out, folders)
    by_seed: dict[str, dict[str, list[float | None]]] = {}
    for name, runs in attempts.items():
        clients = [_validation(attempt) for attempt in runs.values()]
        means = [mean_of_all(each.values()) for each in clients]
        worst = [max(filter(None, each.values())) if mean else None for each, mean in zip(clients, means, strict=True)]
        by_seed[name] = {"validation_nll": means, "validation_nll_worst": worst}
    return {"seeds": list(plan.seeds), "by_seed": by_seed, "learning_rates": dict(chosen)}


def _figures(
    plan: Plan, attempts: Mapping[str, Mapping[int, Attempt]], chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    folders = {
        name: {seed: reopen(attempt.path, attempt.config) for seed, attempt in runs.items()}
        for name, runs in attempts.items()
    }
    _check_same_inputs(plan.out, [folder for runs in folders.values() for folder in runs.values()])
    outcomes = {
        name: {seed: _outcome(folder, "personalized") for seed, folder in runs.items()}
        for name, runs in folders.items()
    }
    first = next(iter(folders.values()))[plan.seeds[0]]
    config = plan.entrants[0].config
    without = {BASE: {plan.seeds[0]: RunOutcome(_records(first, "base"), {})}}
    figures = compare({**without, **outcomes}, plan.against, config.evaluation.bootstrap, config.data_seed)
    return {
        **figures,
        "learning_rates": dict(chosen),
        "protocol": _protocol(plan, config, first.read_manifest()),
        "commits": sorted({commit for runs in folders.values() for each in runs.values() for commit in each.commits}),
        "runs": {
            name: {str(seed): str(each.path.relative_to(plan.out)) for seed, each in runs.items()}
            for name, runs in folders.items()
        },
    }


def _protocol(plan: Plan, config: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that all runs share: model, prompt, records, seeds, budget, and the kind of the intervals."""
    return {
        "fedmide": __version__,
        "model": manifest["model"],
        "prompt": manifest["prompt"],
        "data": {
            name: {part: each[part] for part in ("training", "validation", "test", "truncated")}
            for name, each in manifest["data"].items()
        },
        "data_seed": config.data_seed,
        "seeds": list(plan.seeds),
        "budget": {
            "rounds": plan.budget.rounds,
            "steps_per_round": plan.budget.steps,
            "steps_per_client": plan.budget.rounds * plan.budget.steps,
        },
        "cutoff": config.model.cutoff,
        "interval": f"95 %, {config.evaluation.bootstrap} resamples of each client's records, the same ones for all "
        "methods, each record averaged over seeds; *_of_all: clients and seeds are resampled too; other figures: the "
        "least and the greatest over seeds",
    }


def _outcome(folder: RunFolder, stage: StageName) -> RunOutcome:
    """The measurements of a run's clients, and the run's cost."""
    clients = _records(folder, stage)
    manifest = folder.read_manifest()
    metrics = json.loads((folder.path / "metrics.json").read_text("utf-8"))
    federation = metrics["federation"]
    counted = ["trained_tokens", "scored_tokens"]
    if not methods.of(folder.config).in_one_place:  # there the records would have to travel, not adapters
        counted += ["bytes_down", "bytes_up"]
    costs = {
        **{name: float(federation[name]) for name in counted},
        "steps": float(federation["steps"]),
        "steps_per_client": federation["steps"] / len(clients),
        "seconds": sum(manifest["seconds"].get(stage, 0.0) for stage in ("trained", "personalized")),
        **_model_seconds(manifest),
        "seconds_evaluation": manifest["seconds"].get("evaluated", 0.0),
        **{name: float(metrics["method"][name]) for name in ("trained_parameters", "extra_parameters")},
    }
    for name, each in metrics["over_clients"].get("generation", {}).items():
        costs |= {name: float(each["mean"]), f"{name}_worst": float(each["worst"])}
    return RunOutcome(clients, costs)


def _model_seconds(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of training and of scoring in rounds and tuning; empty if the run did not record them."""
    stages = [manifest.get("model_seconds", {}).get(stage) for stage in ("trained", "personalized")]
    noted = [each for each in stages if each is not None]
    if len(noted) < len(stages):
        return {}
    return {f"seconds_{kind}": sum(each.get(kind, 0.0) for each in noted) for kind in ("training", "scoring")}


def _records(folder: RunFolder, stage: StageName) -> dict[str, Measured]:
    names = folder.read_manifest()["data"]
    found = {name: folder.read_evaluation(name, stage) for name in names}
    return {name: Measured.from_dict(each) for name, each in found.items() if each is not None}


def _check_same_inputs(out: Path, folders: Sequence[RunFolder]) -> None:
    """Refuses runs with different records, models or prompts."""
    manifests = [folder.read_manifest() for folder in folders]
    problems = [
        f"{folder.path}: its {what} is not that of {folders[0].path}"
        for folder, manifest in zip(folders, manifests, strict=True)
        for what in SAME_INPUTS
        if manifest[what] != manifests[0][what]
    ]
    if problems:
        raise RunFolderError(problems, f"Remove those runs, or give another --out than {out}")
