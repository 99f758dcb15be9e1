"""The table of results, as it stands on a terminal of 80 characters."""

from typing import Any

from rich.console import Console

from fedmide.cli.tables import questions_table, results_table


def client(first: int | None, last: int, nlls: tuple[float, ...], accuracy: float | None) -> Any:
    choice = None if accuracy is None else {"accuracy": accuracy}
    stages = {
        name: {"response_nll": {"value": nll}, "choice": choice}
        for name, nll in zip(("base", "aggregated", "personalized"), nlls, strict=True)
    }
    return {"sets": {"shared_at_split": first, "shared": last}, "stages": stages}


def test_every_figure_stands_whole_in_its_row() -> None:
    over = {"response_nll": {"mean": 2.5, "worst": 12.25}, "choice_accuracy": {"mean": 0.5, "worst": 0.125}}
    metrics = {
        "clients": {
            "a-client-whose-name-is-rather-long": client(120, 300, (12.25, 2.0, 1.0), 0.5),
            "b": client(None, 24, (3.0, 2.0, 1.0), None),
        },
        "over_clients": {"base": over, "aggregated": over, "personalized": over},
    }
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results_table(metrics))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "shared base aggregated personalized" in lines
    assert "a-client-whose-name- 120 300 12.250 0.500 2.000 0.500 1.000 0.500" in lines
    assert "is-rather-long" in lines
    assert "b - 24 3.000 - 2.000 - 1.000 -" in lines
    assert "mean 2.500 0.500 2.500 0.500 2.500 0.500" in lines
    assert "worst 12.250 0.125 12.250 0.125 12.250 0.125" in lines


def test_public_questions_have_a_row_each() -> None:
    figures = {"accuracy": 0.25, "standard_error": 0.012, "num_records": 1273}
    metrics = {
        "questions": {
            "medqa": {"base": figures, "aggregated": None, "over_clients": {"accuracy": {"mean": 0.5, "worst": 0.125}}},
            "careqa": {"base": figures, "aggregated": figures},
        }
    }
    console = Console(width=80)
    with console.capture() as captured:
        console.print(questions_table(metrics))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "medqa 1273 0.250 ± 0.012 - 0.500 0.125" in lines
    assert "careqa 1273 0.250 ± 0.012 0.250 ± 0.012 - -" in lines
