"""A site at work: it does each task once, undoes nothing, and sends one word about an error."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedmide.config import Config, load
from fedmide.errors import DataError
from fedmide.federation import server
from fedmide.federation.client import handle
from fedmide.federation.codec import decode_answer, decode_reply, encode_hello, encode_task
from fedmide.federation.messages import ClientReply, ClientTask, Facts, Hello, Trouble
from fedmide.journal.creation import create
from fedmide.journal.folder import RunFolder
from fedmide.model import adapters
from fedmide.runs.inputs import Inputs, read
from fedmide.runs.site import Site, client_state


@dataclass
class Counting:
    """A model that counts its trainings, and fails in them if `fails_with` is set."""

    inner: Any
    trainings: int = 0
    fails_with: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train(self, *args: Any) -> Any:
        self.trainings += 1
        if self.fails_with is not None:
            raise self.fails_with
        return self.inner.train(*args)


@pytest.fixture(scope="module")
def real(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any], one_thread: None
) -> Inputs:
    given = small_input_at(tmp_path_factory.mktemp("site") / "input")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        return read(load(given.config))


@dataclass
class AtWork:
    """Site a in a folder of its own, with its log, and a method that sends it a task."""

    site: Site
    folder: RunFolder
    model: Counting
    told: list[str]

    @property
    def config(self) -> Config:
        return self.folder.config

    def task(self, number: int, federation: str = "", value: float = 0.0) -> ClientTask:
        fresh = self.site.inputs.fresh_adapter()
        adapter = {name: array + value for name, array in fresh.items()} if value else fresh
        return ClientTask(federation or self.site.inputs.federation, "a", number, adapter)

    def ask(self, task: ClientTask) -> Any:
        return decode_answer(self.site.answer(encode_task(task)))


@pytest.fixture
def at_work(real: Inputs, tmp_path: Path) -> AtWork:
    return at_work_with(real, real.resident.config, tmp_path / "run")


def at_work_with(real: Inputs, config: Config, path: Path) -> AtWork:
    model: Any = Counting(replace(real.resident, config=config))
    inputs = replace(real, resident=model)
    folder = create(path, config, {})
    told: list[str] = []
    return AtWork(Site("a", inputs, lambda federation: folder, told.append), folder, model, told)


# --- each task once


def test_it_answers_as_the_client_does(at_work: AtWork) -> None:
    for number in (-1, 0, 1):
        task = at_work.task(number)
        state = client_state(at_work.folder, at_work.site.inputs, "a", task.federation, number)
        expected, after = handle(task, state, at_work.model.inner)
        reply = at_work.ask(task)
        assert isinstance(reply, ClientReply)
        assert (reply.num_records, reply.metrics) == (expected.num_records, expected.metrics)
        assert reply.adapter is not None and expected.adapter is not None
        assert adapters.encode(reply.adapter) == adapters.encode(expected.adapter)
        assert at_work.folder.read_ledger("a") == after.ledger


def test_a_task_that_comes_again_trains_only_once(at_work: AtWork) -> None:
    frame = encode_task(at_work.task(-1))
    answers = {at_work.site.answer(frame) for _ in range(3)}
    assert (len(answers), at_work.model.trainings) == (1, 1)
    again = Site("a", at_work.site.inputs, at_work.site.open_folder)  # as if its process was started again
    assert again.answer(frame) in answers
    assert at_work.model.trainings == 1


def test_another_task_of_the_same_round_starts_from_before_that_round(at_work: AtWork) -> None:
    at_work.ask(at_work.task(-1))
    first = at_work.ask(at_work.task(0))
    ledger = at_work.folder.read_ledger("a")
    at_work.ask(at_work.task(0, value=0.01))
    assert at_work.folder.read_ledger("a") != ledger
    again = at_work.ask(at_work.task(0))
    assert (again.metrics, at_work.folder.read_ledger("a")) == (first.metrics, ledger)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_task_of_an_earlier_round_undoes_nothing(at_work: AtWork, is_kept: bool) -> None:
    for number in (-1, 0):
        at_work.ask(at_work.task(number))
    ledger = at_work.folder.read_ledger("a")
    if not is_kept:
        (at_work.folder.site("a") / "answer.bin").unlink()
    assert at_work.ask(at_work.task(-1)) == Trouble("a", "round")
    assert at_work.folder.read_ledger("a") == ledger


def test_the_tuned_adapter_stays_at_the_site(at_work: AtWork) -> None:
    for number in (-1, 0, 1, 2):
        reply = at_work.ask(at_work.task(number))
    assert (reply.adapter, reply.num_records) == (None, 0)
    kept = adapters.read(at_work.folder.personal_adapter("a") / "adapter_model.safetensors")
    assert adapters.shapes(kept) == adapters.shapes(at_work.task(0).adapter)


# --- what a method keeps


@pytest.mark.parametrize(
    "how",
    [
        ["method=local"],
        ["method=scaffold"],
        ["method=ditto"],
        ["method=fedavg-ft", "personalization.start=own"],
        ["scoring.without_own=true"],
    ],
)
def test_a_lost_method_state_is_never_taken_for_an_empty_one(
    real: Inputs, how: list[str], small_input: Any, tmp_path: Path
) -> None:
    at_work = at_work_with(real, load(small_input.config, how), tmp_path / "run")
    begun = server.begin(real.federation, ("a",), real.fresh_adapter(), at_work.config)
    tasks = [server.plan(replace(begun, round=number), at_work.config)[0] for number in (0, 1)]
    assert isinstance(at_work.ask(tasks[0]), ClientReply)
    (kept,) = (at_work.folder.site("a") / "memory").iterdir()
    method_state = kept.read_bytes()
    kept.unlink()
    assert at_work.ask(tasks[1]) == Trouble("a", "ledger")
    assert "the method state of round 0 is missing" in at_work.told[-1]
    kept.write_bytes(method_state)
    assert isinstance(at_work.ask(tasks[1]), ClientReply)


def test_a_site_that_only_scored_has_no_method_state_to_lose(real: Inputs, small_input: Any, tmp_path: Path) -> None:
    at_work = at_work_with(real, load(small_input.config, ["scoring.without_own=true"]), tmp_path / "run")
    assert isinstance(at_work.ask(replace(at_work.task(0), train=False)), ClientReply)
    assert isinstance(at_work.ask(at_work.task(1)), ClientReply)


# --- who it is


def test_it_states_its_facts(at_work: AtWork) -> None:
    federation = at_work.site.inputs.federation
    facts = decode_answer(at_work.site.answer(encode_hello(Hello(f"{federation}-0123abcd", 0))))
    assert isinstance(facts, Facts)
    assert (facts.federation, facts.client) == (federation, "a")
    assert (facts.shared, facts.personal) == (9, 0)
    assert facts.knobs["lora.r"] == "2"
    assert not any("/" in value for value in facts.knobs.values()), "no path of this machine"


def test_it_states_the_sizes_of_its_sets_before_the_round(at_work: AtWork) -> None:
    sizes = []
    for number in (-1, 0, 1):
        reply = at_work.ask(at_work.task(number))
        sizes.append(tuple(int(reply.metrics[name].sum) for name in ("shared", "personal")))
    for place, number in enumerate((0, 1, 2)):
        facts = decode_answer(at_work.site.answer(encode_hello(Hello(at_work.site.inputs.federation, number))))
        assert isinstance(facts, Facts)
        assert (facts.shared, facts.personal) == sizes[place]


def test_it_works_for_its_federation_only(at_work: AtWork) -> None:
    assert at_work.ask(at_work.task(-1, "0" * 16)) == Trouble("a", "federation")
    facts = decode_answer(at_work.site.answer(encode_hello(Hello("0" * 16, 0))))
    assert isinstance(facts, Facts)
    assert (facts.shared, facts.personal) == (-1, -1)
    assert at_work.model.trainings == 0


# --- errors


SECRET = "Maria M., 63, carcinoma"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(SECRET), "failed"),
        (MemoryError(SECRET), "failed"),
        (DataError(SECRET), "site"),
        (OSError(errno.ENOSPC, SECRET), "failed"),
    ],
)
def test_one_word_of_an_error_leaves_the_site(at_work: AtWork, error: Exception, code: Any) -> None:
    at_work.model.fails_with = error
    answer = at_work.site.answer(encode_task(at_work.task(-1)))
    assert decode_answer(answer) == Trouble("a", code)
    assert SECRET.encode() not in answer
    assert any(SECRET in line for line in at_work.told), "the site's own log has it"
    at_work.model.fails_with = None
    assert isinstance(at_work.ask(at_work.task(-1)), ClientReply), "it can be asked again"


def test_a_full_disk_is_reported_and_leaves_the_ledger_unchanged(
    at_work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work.ask(at_work.task(-1))
    ledger = at_work.folder.read_ledger("a")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert at_work.ask(at_work.task(0)) == Trouble("a", "disk")
    assert at_work.folder.read_ledger("a") == ledger
    reply = at_work.ask(at_work.task(0))
    assert isinstance(reply, ClientReply)


def test_a_damaged_ledger_is_reported(at_work: AtWork) -> None:
    at_work.ask(at_work.task(-1))
    (at_work.folder.site("a") / "ledger.jsonl").write_text("{}\n")
    assert at_work.ask(at_work.task(0)) == Trouble("a", "ledger")


@pytest.mark.parametrize("frame", [b"", b"FMD1", b"FMD2" + b"\x00" * 40, b"FMD1\x05\x00\x00\x00[[[[["])
def test_noise_is_answered_with_one_word(at_work: AtWork, frame: bytes) -> None:
    assert decode_answer(at_work.site.answer(frame)) == Trouble("a", "message")


def test_the_kept_answer_is_that_of_the_last_task(at_work: AtWork) -> None:
    at_work.ask(at_work.task(-1))
    kept = (at_work.folder.site("a") / "answer.bin").read_bytes()
    assert decode_reply(kept[32:]).round == -1
