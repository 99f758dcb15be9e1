"""Public multiple-choice sets under an adapter, scored by likelihood as lm-evaluation-harness does it.

A choice is scored as a continuation of the question's prompt, without a template and without an end of sequence.
Texts that are too long for the model are cut at the beginning and counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from fedmide.config import Config
from fedmide.data.questions import FORMS, Question, SetName, fingerprint
from fedmide.data.tokens import Encoder
from fedmide.evaluation.measure import sums_from_json
from fedmide.evaluation.options import right_first
from fedmide.evaluation.over_clients import over_clients
from fedmide.evaluation.summary import Figures, StageName, choice_figures
from fedmide.model.interface import Adapter, LocalModel
from fedmide.seeds import stream


@dataclass(frozen=True)
class Scored:
    """One adapter's NLL sums of the choices of each question, in nats, the right one first.

    `questions`: the fingerprint of the questions. `longest`: texts with more tokens than this are cut.
    `num_truncated`: the number of questions with a text that was cut.
    """

    questions: str
    sums: tuple[tuple[float, ...], ...]
    longest: int
    num_truncated: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scored":
        """Reads back the values of `dataclasses.asdict` from JSON."""
        return cls(values["questions"], sums_from_json(values["sums"]), values["longest"], values["num_truncated"])


def draw_questions(questions: Sequence[Question], most: int, seed: int) -> tuple[Question, ...]:
    """At most `most` of the questions, in their order; all if `most` is 0. Each adapter and method gets the same."""
    if not most or len(questions) <= most:
        return tuple(questions)
    drawn = stream(seed, "questions").choice(len(questions), size=most, replace=False)
    return tuple(questions[number] for number in sorted(drawn))


def score_questions(
    model: LocalModel, adapter: Adapter, encode: Encoder, questions: Sequence[Question], longest: int
) -> Scored:
    """Scores the questions' choices under the adapter. Texts of more than `longest` tokens are cut."""
    rows = [
        [encode.continued(each.prompt, f" {choice}", longest) for choice in right_first(each.choices, each.answer)]
        for each in questions
    ]
    nlls = iter(model.nll(adapter, list(chain.from_iterable(rows)), "response"))
    sums = tuple(tuple(next(nlls).sum for _ in row) for row in rows)
    num_truncated = sum(any(example.truncated for example in row) for row in rows)
    return Scored(fingerprint(questions), sums, longest, num_truncated)


def set_figures(
    name: SetName, questions: Sequence[Question], scored: Mapping[tuple[StageName, str], Scored], config: Config
) -> Figures:
    """The accuracies on a public set under each adapter, by stage; those of tuned adapters also by client."""
    lengths = [[len(choice) for choice in right_first(question.choices, question.answer)] for question in questions]
    figures = {key: _figures(each, lengths, config) for key, each in scored.items()}
    clients = {client: each for (stage, client), each in figures.items() if stage == "personalized" and each}
    return {
        "protocol": {
            "prompt": FORMS[name].prompt,
            "hash": FORMS[name].hash,
            "questions": fingerprint(questions),
            "scores": "as lm-evaluation-harness: a choice continues the prompt after a space; accuracy: largest summed "
            "log-probability; accuracy_norm: divided by characters; equal choices share the credit; texts that are "
            "longer than the model reads are cut at the beginning",
            "interval": f"95 %, bootstrap over questions, {config.evaluation.bootstrap} resamples",
        },
        **{stage: each for (stage, _), each in figures.items() if stage != "personalized"},
        **({"personalized": clients, "over_clients": _over(clients)} if clients else {}),
    }


def _figures(scored: Scored, lengths: Sequence[Sequence[int]], config: Config) -> Figures | None:
    figures = choice_figures(scored.sums, lengths, config)
    return figures and {**figures, "num_truncated": scored.num_truncated, "longest": scored.longest}


def _over(clients: Mapping[str, Figures]) -> Figures:
    weights = {client: each["num_records"] for client, each in clients.items()}
    return {
        metric: asdict(over_clients({c: each[metric] for c, each in clients.items()}, weights, lower_is_better=False))
        for metric in ("accuracy", "accuracy_norm")
    }
