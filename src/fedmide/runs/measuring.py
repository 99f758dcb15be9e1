"""Measurements of adapters on test records and public questions, stored so that each is made once."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedmide import methods
from fedmide.data.questions import Question, SetName, fingerprint
from fedmide.errors import RunFolderError
from fedmide.evaluation import summary
from fedmide.evaluation.measure import Measured, measure
from fedmide.evaluation.questions import Scored, score_questions, set_figures
from fedmide.model.generation import default_max_new_tokens
from fedmide.model.interface import Adapter
from fedmide.model.pretrained.hf import read_peft
from fedmide.progress import Advance
from fedmide.runs.opening import Run, record_ids


def is_personalized(run: Run) -> bool:
    """True if all clients have tuned adapters, False if none has; a mix is refused."""
    if run.folder.is_site:  # only the server records whose tuning counts
        return all(run.folder.personal_adapter(name).is_dir() for name in run.inputs.clients)
    missing = [name for name in run.inputs.clients if not run.folder.is_personalized(name)]
    if 0 < len(missing) < len(run.inputs.clients):
        raise RunFolderError(
            f"{run.folder.path}: sites not yet personalized: {', '.join(missing)}",
            f"First: fedmide personalize {run.folder.path}",
        )
    return not missing


def personal_adapter(run: Run, name: str) -> Adapter:
    """A client's tuned adapter, read from the run folder."""
    return read_peft(run.folder.personal_adapter(name), run.inputs.resident.model.shapes)


def responses(run: Run, name: str) -> bytes:
    """A client's predictions as JSON lines: record id, instruction, reference and the model's response."""
    config, examples = run.config.generation, run.inputs.examples[name]
    count = config.max_records or len(examples.test)
    longest = config.max_new_tokens or default_max_new_tokens(examples.training)
    if run.inputs.resident.model.num_positions is not None:
        prompts = max((example.prompt_length for example in examples.test[:count]), default=0)
        longest = min(longest, run.inputs.resident.model.num_positions - prompts)
    records = run.inputs.clients[name].test[:count]
    texts = run.inputs.resident.generate(personal_adapter(run, name), examples.test[:count], longest)
    lines = [
        {
            "record_id": record.id,
            "instruction": record.instruction,
            "reference": record.response,
            "prediction": text,
        }
        for record, text in zip(records, texts, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def measurements(run: Run, name: str, stage: summary.StageName, aggregated: Adapter) -> Measured:
    """The measurements of a client's test records under an adapter: read if stored, else made and stored."""
    earlier = run.folder.read_evaluation(name, stage)
    if earlier is not None:
        return Measured.from_dict(earlier)
    measured = measure(
        run.inputs.resident,
        _adapter(run, name, stage, aggregated),
        run.inputs.encode,
        run.inputs.clients[name],
        run.config,
    )
    run.folder.save_evaluation(name, stage, asdict(measured))
    return measured


def ask_all(run: Run, name: SetName, questions: Sequence[Question], aggregated: Adapter, advance: Advance) -> None:
    """Asks every adapter the questions of a public set; an adapter's answers are stored, so that it is asked once."""
    longest = run.inputs.resident.model.num_positions or run.config.model.cutoff
    own: list[tuple[summary.StageName, str]] = [("personalized", client) for client in run.inputs.clients]
    scored: dict[tuple[summary.StageName, str], Scored] = {}
    asked = fingerprint(questions)
    for stage, client in [("base", ""), ("aggregated", ""), *(own if is_personalized(run) else ())]:
        about = f"{stage}-{client}" if client else stage
        earlier = run.folder.read_questions(name, about)
        if earlier is None or earlier["questions"] != asked:
            adapter = _adapter(run, client, stage, aggregated)
            found = score_questions(run.inputs.resident, adapter, run.inputs.encode, questions, longest)
            run.folder.save_questions(name, about, asdict(found))
            # read back, so that sums that are not finite look the same now and when a run is resumed
            earlier = run.folder.read_questions(name, about) or {}
        scored[stage, client] = Scored.from_dict(earlier)
        advance(1, f"{name}, {about}")
    run.folder.save_questions(name, "figures", set_figures(name, questions, scored, run.config))


def _adapter(run: Run, name: str, stage: summary.StageName, aggregated: Adapter) -> Adapter:
    if stage == "personalized":
        return personal_adapter(run, name)
    return aggregated if stage == "aggregated" else run.inputs.fresh_adapter()


def method_figures(run: Run) -> dict[str, Any]:
    """The run's method for metrics.json: its name, its source, and the values that a client works with."""
    method = methods.of(run.config)
    sizes = method.sizes(run.inputs.fresh_adapter(), tuple(run.inputs.clients), run.config)
    return {"name": method.name, "source": method.source, **asdict(sizes)}


def figures_of_sets(run: Run, name: str) -> dict[str, Any]:
    """The figures of a client's shared and personal set, from its ledger."""
    return summary.set_figures(run.folder.read_ledger(name), record_ids(run, name))
