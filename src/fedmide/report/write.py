"""Writes facts as one self-contained page, which needs no network and no other file. It is written atomically."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from fedmide.atomic import without_nan, write_file
from fedmide.errors import UsageError
from fedmide.journal.folder import RunFolder
from fedmide.report import compared, findings, outcome_figures, round_figures, score_figures, settings
from fedmide.report.facts import RunFacts, read
from fedmide.report.figure import Figure, Table, counted, counted_rounds
from fedmide.report.passages import Passage, passages
from fedmide.version import __version__

OUTCOME = (outcome_figures.change_figure, outcome_figures.nll_figure)


ROUNDS = (
    round_figures.enrollment_figure,
    round_figures.shared_part_figure,
    round_figures.loss_figure,
    round_figures.convergence_figure,
)


SCORES = (score_figures.histogram_figure, score_figures.length_figure)


COST = (round_figures.cost_figure,)


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading. Empty sections are left out."""

    key: str
    title: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    remark: str = ""


def write(folder: RunFolder, out: Path | None = None, with_records: bool = False) -> Path:
    """Writes a run's report and returns its path: RUN/report.html, or `out`.

    `with_records` puts texts of records on the page and marks it as private to the sites.
    """
    facts = read(folder)
    texts = passages(folder, facts) if with_records else ()
    path = out or folder.path / ("report-with-records.html" if with_records else "report.html")
    write_file(path, page(facts, texts).encode())
    return path


def compare(folders: Sequence[RunFolder], out: Path) -> Path:
    """Writes a page that compares each run with the first one, and returns its path."""
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise UsageError("a run can't be compared with itself", "Name each run folder once")
    runs = compared.labeled([read(folder) for folder in folders])
    write_file(out, comparison_page(runs).encode())
    return out


def page(facts: RunFacts, texts: Sequence[Passage] = ()) -> str:
    """The report of one run as HTML."""
    sections = [
        Section(
            "outcome",
            "Did it help?",
            _drawn(OUTCOME, facts),
            (
                ("NLL of each site's test responses", outcome_figures.likelihood_table(facts)),
                ("Choice, generated responses and sets of each site", outcome_figures.other_table(facts)),
            )
            if facts.outcomes
            else (),
        ),
        Section("flow", "What happened to the records", _drawn(ROUNDS, facts)),
        Section("scores", "How records were distinguished", _drawn(SCORES, facts), remark=_about_scores(facts)),
        Section("cost", "What it cost", _drawn(COST, facts)),
        Section(
            "settings",
            "What exactly ran",
            tables=(
                ("Versions, seed and fingerprints", settings.provenance_table(facts)),
                ("Records of each site", settings.data_table(facts)),
                ("How the figures were measured", settings.protocol_table(facts)),
                ("Configuration", settings.config_table(facts)),
            ),
        ),
    ]
    config = facts.config
    sites = counted(len(facts.clients), "site")
    rounds = counted_rounds(config.warmup.rounds, config.federation.rounds)
    return _render(
        title=facts.name,
        subtitle=f"{config.method}: {sites}, {rounds}, {config.model.name}",
        headline=findings.headline(facts),
        numbers=findings.numbers(facts),
        cautions=findings.cautions(facts),
        clients=facts.clients,
        sections=sections,
        passages=tuple(texts),
    )


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """The comparison of runs as HTML."""
    clients = tuple(dict.fromkeys(client for run in runs for client in run.clients))
    sections = [
        Section("outcome", "Which run is better?", compared.figures(runs), (("The runs", compared.runs_table(runs)),)),
        Section("settings", "How they differ", tables=(("Settings that differ", compared.knobs_table(runs)),)),
    ]
    return _render(
        title=" against ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        subtitle=f"each against {runs[0].name}",
        headline=compared.headline(runs),
        numbers=(),
        cautions=compared.cautions(runs),
        clients=clients,
        sections=sections,
        passages=(),
    )


def _drawn(makers: Sequence[Any], facts: RunFacts) -> tuple[Figure, ...]:
    """The figures for which the facts have data."""
    return tuple(figure for make in makers if (figure := make(facts)) is not None)


def _about_scores(facts: RunFacts) -> str:
    """The source of the scores, or the reason why there are none."""
    if facts.scores:
        return (
            "These figures come from the sites' own ledgers, counted in bins. If you pass this page on, you pass on "
            "the distribution of the sites' scores."
        )
    return "No scores are shown: the ledgers are not here or have no verdicts."


def _render(sections: Sequence[Section], **values: Any) -> str:
    shown = [each for each in sections if each.figures or each.tables or each.remark]
    drawn = {figure.key: [asdict(plot) for plot in figure.plots] for each in shown for figure in each.figures}
    return _template().render(
        **values,
        sections=shown,
        figures=without_nan(drawn),
        version=__version__,
        style=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_asset("plotly-basic.min.js"),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_function"] = _dumps
    return environment.from_string(_asset("report.html.j2"))


def _dumps(value: object, **options: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=list)


def _asset(name: str) -> str:
    return resources.files("fedmide.report").joinpath("page", name).read_text("utf-8")
