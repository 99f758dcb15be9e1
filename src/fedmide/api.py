"""The package as a library: do a run, and read its results as plain tables.

    import fedmide
    results = fedmide.run("examples/tiny.toml", out="runs/first")
    results.clients().to_pandas()

A run from here is the same as one from the command line, in the same kind of run folder. All results come from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmide.config import Config, load, parse
from fedmide.errors import RunFolderError, UsageError
from fedmide.journal.creation import RUNS, free_folder, reopen
from fedmide.journal.folder import RunFolder
from fedmide.report.facts import turns

if TYPE_CHECKING:
    import pandas


Row = dict[str, Any]


class Table(list[Row]):
    """Rows of plain values; all rows have the same keys."""

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame; raises `UsageError` if pandas is not installed."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise UsageError(
                "pandas is not installed", "Install it: pip install pandas. Or use the rows as they are"
            ) from None
        return DataFrame(list(self))


@dataclass(frozen=True)
class Results:
    """The results of a run, finished or not, read from its folder."""

    path: Path
    config: Config
    manifest: Mapping[str, Any]
    """Versions, fingerprints of data and model, seconds, status."""
    metrics: Mapping[str, Any]
    """All measurements, as in metrics.json; empty before the evaluation."""

    def rounds(self) -> Table:
        """One row per client and round: loss in nats per token, sizes of its sets, bytes, seconds."""
        return Table(asdict(turn) for turn in turns(self._folder))

    def clients(self) -> Table:
        """One row per client and adapter: response NLL (nats per token) and choice accuracy, with 95 % intervals."""
        return Table(self._measured())

    def over_clients(self) -> Table:
        """One row per adapter and measure: mean over the clients, the worst client, and the spread."""
        return Table(
            {"adapter": adapter, "measure": measure, **figures}
            for adapter, measures in self.metrics.get("over_clients", {}).items()
            for measure, figures in measures.items()
            if figures is not None
        )

    def scores(self, client: str) -> Table:
        """One row per entry of a client's ledger: a record's score, its set, and the reason. Keep it on the site."""
        self._check(client)
        return Table(asdict(entry) for entry in self._folder.read_ledger(client))

    def responses(self, client: str) -> Table:
        """One row per response that a client's model generated, with its reference. Keep it on the site."""
        self._check(client)
        return Table(self._folder.read_predictions(client))

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path, self.config)

    def _check(self, client: str) -> None:
        if client not in self.manifest["data"]:
            known = ", ".join(self.manifest["data"])
            raise RunFolderError(f"{self.path}: there is no site {client!r}", f"Known: {known}")

    def _measured(self) -> Iterator[Row]:
        for client, figures in self.metrics.get("clients", {}).items():
            for adapter, each in figures["stages"].items():
                nll, choice = each["response_nll"] or {}, each["choice"] or {}
                yield {
                    "client": client,
                    "adapter": adapter,
                    "num_records": each["num_records"],
                    "response_nll": nll.get("value"),
                    "response_nll_low": nll.get("low"),
                    "response_nll_high": nll.get("high"),
                    "choice_accuracy": choice.get("accuracy"),
                    "choice_accuracy_low": choice.get("low"),
                    "choice_accuracy_high": choice.get("high"),
                    "shared": figures["sets"]["shared"],
                    "personal": figures["sets"]["personal"],
                }


def run(config: Config | Mapping[str, Any] | str | Path, out: str | Path = "", quiet: bool = False) -> Results:
    """Does the whole method, from records to metrics, in a run folder: `out`, by default runs/NAME-NNN.

    `config`: a TOML file, its values, or the result of `fedmide.config.load`. If `out` is a run with the same
    configuration, it is resumed, and no finished work is repeated. Progress goes to stderr unless `quiet`. Raises
    `fedmide.errors.UserError`, whose text says what to do.
    """
    from fedmide import progress as shown
    from fedmide.runs import opening, stages
    from fedmide.terminal import bars, tell

    name = Path(config).stem if isinstance(config, str | Path) else "run"
    chosen, path = _chosen(config), Path(out) if out else free_folder(RUNS, name)
    say, progress = (shown.quiet, shown.silent) if quiet else (tell, bars)
    is_begun = (path / "config.toml").is_file()
    opened = opening.resume(path, chosen, say) if is_begun else opening.start(chosen, path, say)
    with opened as begun:
        for stage in (stages.train, stages.personalize, stages.generate, stages.evaluate):
            stage(begun, progress)
    return read_run(path)


def read_run(path: str | Path) -> Results:
    """The results of the run in a folder, as far as it is; raises `RunFolderError` if that is not a run folder."""
    folder = reopen(Path(path))
    return Results(folder.path, folder.config, folder.read_manifest(), folder.read_metrics())


def _chosen(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    return parse(config) if isinstance(config, Mapping) else load(Path(config))
