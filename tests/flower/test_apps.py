"""The apps that Flower runs: frames arrive whole, and no text of an error leaves a site."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, RecordDict

from fedmide.federation.codec import decode_answer, encode_hello, encode_task, split_frame
from fedmide.federation.messages import ClientTask, Hello, Trouble
from fedmide.federation.runtimes.link import Answered
from fedmide.flower import apps
from fedmide.flower.apps import GridExchange, frame_of, records_of


def test_the_process_of_each_message_loads_no_model_s_libraries() -> None:
    code = "import sys; import fedmide.flower.apps, fedmide.flower.asking; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "flwr" in loaded
    assert {"torch", "transformers", "peft", "scipy"} & set(loaded) == set()


def frames(fakes: Any) -> list[bytes]:
    return [encode_hello(Hello("f", 0)), encode_task(ClientTask("f", "a", 0, fakes.adapter(1.0)))]


def test_a_frame_travels_whole_and_its_adapter_as_one_array(fakes: Any) -> None:
    for frame in frames(fakes):
        records = records_of(*split_frame(frame))
        assert frame_of(records) == frame
        assert len(records.array_records) == (1 if split_frame(frame)[1] else 0)
        assert all(len(record) == 1 for record in records.array_records.values())


class Told:
    """A message as Flower's grid returns it."""

    def __init__(self, to: str, content: Any = None, error: Any = None) -> None:
        self.metadata = type("Metadata", (), {"reply_to_message_id": to})()
        self.content, self.error = content, error

    def has_error(self) -> bool:
        return self.error is not None


@dataclass
class Sent:
    """A message to a node; Flower makes its own within a run only."""

    content: Any
    dst_node_id: int
    message_type: str
    ttl: float


@pytest.fixture
def sendable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "Message", Sent)


class Grid:
    """Nodes that send back the frame that they got.

    Node 3 answers with an error, node 4 with something else, node 5 never.
    """

    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}
        self.pushes = 0

    def get_node_ids(self) -> list[int]:
        return [5, 2, 1]

    def push_messages(self, messages: list[Any]) -> list[str]:
        (message,) = messages
        self.pushes += 1
        self.sent[f"m{self.pushes}"] = message
        return [f"m{self.pushes}"]

    def pull_messages(self, names: list[str]) -> list[Told]:
        answers = []
        for name in names:
            message = self.sent[name]
            node = message.dst_node_id
            if node == 3:
                answers.append(Told(name, error=Error(5, "words of a patient")))
            elif node == 4:
                answers.append(Told(name, RecordDict({"x": ConfigRecord({"y": 1})})))
            elif node != 5:
                answers.append(Told(name, message.content))
        return [*answers, Told("unknown")]


def test_each_answer_is_that_of_the_node_that_was_asked(fakes: Any, sendable: None) -> None:
    frame = frames(fakes)[1]
    grid: Any = Grid()
    exchange = GridExchange(grid)
    assert exchange.nodes() == [1, 2, 5]
    answers = list(exchange.ask(((node, frame) for node in (1, 2, 3, 4, 5)), 1.0))
    assert answers == [
        Answered(1, frame),
        Answered(2, frame),
        Answered(3, b"", "the site can't be reached (Flower's error 5)"),
        Answered(4, b"", "the site's answer can't be read: it is not a frame"),
    ]


def test_the_same_adapter_is_held_once_for_all(fakes: Any, sendable: None) -> None:
    grid: Any = Grid()
    tasks = [encode_task(ClientTask("f", name, 0, fakes.adapter(1.0))) for name in "ab"]
    list(GridExchange(grid).ask([(1, tasks[0]), (2, tasks[1])], 0.1))
    one, two = (message.content.array_records["adapter"]["frame"].data for message in grid.sent.values())
    assert one is two


@pytest.mark.parametrize("where", ["no place", "no worker"])
def test_a_site_that_can_t_work_answers_with_one_word(where: str, tmp_path: Path, fakes: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fedmide.flower.asking._WAIT_SECONDS", 0.1)
    for name in ("FEDMIDE_SITE", "FEDMIDE_RUN"):
        monkeypatch.delenv(name, raising=False)
    if where == "no worker":
        monkeypatch.setitem(os.environ, "FEDMIDE_SITE", str(tmp_path))
    message: Any = Told("m", records_of(*split_frame(frames(fakes)[0])))
    monkeypatch.setattr(apps, "Message", lambda content, reply_to: content)
    assert decode_answer(frame_of(apps.answer(message, None))) == Trouble("", "worker")  # type: ignore[arg-type]
