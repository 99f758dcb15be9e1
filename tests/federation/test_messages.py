"""Messages: there and back exactly, only `MessageError` from what is broken, no record's figure in a reply."""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmide.config import Config
from fedmide.data.records import Record, with_ids
from fedmide.data.tokens import Example
from fedmide.errors import MessageError
from fedmide.federation import messages
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.codec import (
    MAX_HEADER_BYTES,
    decode_answer,
    decode_reply,
    decode_request,
    decode_task,
    encode_facts,
    encode_hello,
    encode_reply,
    encode_task,
    encode_tasks,
    encode_trouble,
    split_frame,
)
from fedmide.federation.messages import (
    MAX_RECORDS,
    ClientReply,
    ClientTask,
    Facts,
    Hello,
    Metric,
    MetricName,
    Trouble,
    TroubleCode,
)
from fedmide.model import adapters
from fedmide.model.interface import Nll

ADAPTER = {"x.lora_A.weight": np.ones((1, 2), np.float32), "x.lora_B.weight": np.zeros((2, 1), np.float32)}

names = st.text(max_size=64).filter(lambda name: len(name) <= 64)
rounds = st.integers(-10, 10**6)
any_adapter = st.dictionaries(
    st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 3)), elements=st.floats(width=32)),
    min_size=1,
    max_size=3,
)
metrics = st.dictionaries(
    st.sampled_from(get_args(MetricName)),
    st.builds(Metric, st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 10**9)),
)
tasks = st.builds(ClientTask, names, names, rounds, any_adapter, st.booleans(), st.booleans())
replies = st.builds(
    ClientReply, names, names, rounds, st.none() | any_adapter, st.integers(0, MAX_RECORDS), metrics
)  # fmt: skip


def told(message: ClientTask | ClientReply) -> dict[str, Any]:
    """The fields, with the adapter as its bytes."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {**values, "adapter": None if message.adapter is None else adapters.encode(message.adapter)}


# --- there and back


@given(tasks)
def test_a_task_is_read_back_exactly(task: ClientTask) -> None:
    data = encode_task(task)
    assert told(decode_task(data)) == told(task)
    assert encode_task(decode_task(data)) == data


@given(replies)
def test_a_reply_is_read_back_exactly(reply: ClientReply) -> None:
    data = encode_reply(reply)
    assert told(decode_reply(data)) == told(reply)
    assert encode_reply(decode_reply(data)) == data


def test_a_frame_is_a_magic_word_a_length_a_header_and_the_adapter() -> None:
    reply = ClientReply("f", "a", 2, ADAPTER, 3, {"loss": Metric(1.5, 4)})
    payload = adapters.encode(ADAPTER)
    data = encode_reply(reply)
    (length,) = struct.unpack("<I", data[4:8])
    assert data[:4] == b"FMD1"
    assert data[8 + length :] == payload
    assert json.loads(data[8 : 8 + length]) == {
        "federation": "f",
        "client": "a",
        "round": 2,
        "kind": "reply",
        "num_records": 3,
        "has_adapter": True,
        "metrics": {"loss": {"sum": 1.5, "count": 4}},
    }


def test_a_reply_without_an_adapter_has_no_payload() -> None:
    data = encode_reply(ClientReply("f", "a", 2, None, 0))
    assert len(data) == 8 + struct.unpack("<I", data[4:8])[0]
    assert decode_reply(data).adapter is None


# --- what is broken


def frame(header: Any, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"FMD1" + struct.pack("<I", len(text)) + text + payload


REPLY = {
    "federation": "f",
    "client": "a",
    "round": 2,
    "kind": "reply",
    "num_records": 0,
    "has_adapter": False,
    "metrics": {},
}
TASK = {"federation": "f", "client": "a", "round": 2, "kind": "task", "restart": False, "train": True}


@pytest.mark.parametrize(
    "change",
    [
        {"text": "secret-text"},
        {"secret-text": 1},
        {"records": ["secret-text"]},
        {"kind": "task"},
        {"kind": "other"},
        {"federation": "secret-text" * 6},
        {"client": 7},
        {"round": 2.5},
        {"round": "2"},
        {"round": True},
        {"round": None},
        {"num_records": -1},
        {"num_records": MAX_RECORDS + 1},
        {"num_records": 10**400},
        {"num_records": 1.0},
        {"has_adapter": "false"},
        {"has_adapter": True},
        {"metrics": []},
        {"metrics": {"secret-text": {"sum": 1.0, "count": 1}}},
        {"metrics": {"loss": 1.0}},
        {"metrics": {"loss": {"sum": "secret-text", "count": 1}}},
        {"metrics": {"loss": {"sum": math.nan, "count": 1}}},
        {"metrics": {"loss": {"sum": math.inf, "count": 1}}},
        {"metrics": {"loss": {"sum": 10**400, "count": 1}}},
        {"metrics": {"loss": {"sum": 1.0, "count": -1}}},
        {"metrics": {"loss": {"sum": 1.0}}},
        {"metrics": {"loss": {"sum": 1.0, "count": 1, "each": [0.5, 0.5]}}},
    ],
)
def test_a_reply_with_a_false_header_is_refused(change: dict[str, Any]) -> None:
    decode_reply(frame(REPLY))
    with pytest.raises(MessageError) as caught:
        decode_reply(frame({**REPLY, **change}))
    assert "secret-text" not in str(caught.value)


@pytest.mark.parametrize("change", [{"kind": "reply"}, {"restart": 1}, {"train": None}, {"seed": 3}, {"round": 1e300}])
def test_a_task_with_a_false_header_is_refused(change: dict[str, Any]) -> None:
    payload = adapters.encode(ADAPTER)
    decode_task(frame(TASK, payload))
    with pytest.raises(MessageError):
        decode_task(frame({**TASK, **change}, payload))


@pytest.mark.parametrize("missing", sorted(REPLY))
def test_a_reply_that_leaves_something_out_is_refused(missing: str) -> None:
    with pytest.raises(MessageError, match=missing):
        decode_reply(frame({name: value for name, value in REPLY.items() if name != missing}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FMD",
        b"FMD1",
        b"FMD1\0\0\0",
        b"FMD2" + frame(REPLY)[4:],
        b"PK\x03\x04" + b"\0" * 40,
        b"\x80\x04cposix\nsystem\n.",
        b"FMD1" + struct.pack("<I", 2**32 - 1) + b"{}",
        b"FMD1" + struct.pack("<I", 100) + b"{}",
        frame(b"{" + b" " * MAX_HEADER_BYTES + b"}"),
        frame(b""),
        frame(b"\xff\xfe{}"),
        frame(b"[" * 60_000),
        frame(b'{"a":' * 10_000),
        frame(b'{"round": ' + b"9" * 60_000 + b"}"),
        frame(b'{"client": "\\ud800"}'),
        frame([]),
        frame(REPLY, b"and a record's text"),
    ],
)
def test_bytes_that_are_not_a_message_are_a_message_error(data: bytes) -> None:
    for decode in (decode_reply, decode_task):
        with pytest.raises(MessageError):
            decode(data)


def test_a_header_is_of_bounded_length_and_whole() -> None:
    text = json.dumps(REPLY).encode()
    longest = text + b" " * (MAX_HEADER_BYTES - len(text))
    decode_reply(frame(longest))
    for data in (frame(longest + b" "), frame(text)[:-1], b"FMD1" + struct.pack("<I", len(text) + 1) + text):
        with pytest.raises(MessageError, match="header is cut off or too long"):
            decode_reply(data)


FRAMES = (
    encode_task(ClientTask("f", "a", 2, ADAPTER)),
    encode_reply(ClientReply("f", "a", 2, ADAPTER, 3, {"loss": Metric(1.5, 4)})),
)


def assert_message_or_message_error(data: bytes) -> None:
    for decode in (decode_task, decode_reply):
        try:
            decode(data)
        except MessageError as error:
            assert str(error)


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_raise_nothing_else(data: bytes, with_magic: bool) -> None:
    assert_message_or_message_error(b"FMD1" + struct.pack("<I", len(data) // 2) + data if with_magic else data)


@given(st.sampled_from(FRAMES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), max_size=4))
def test_flipped_bits_raise_nothing_else(data: bytes, flips: list[tuple[int, int]]) -> None:
    broken = bytearray(data)
    for place, bit in flips:
        broken[place % len(broken)] ^= 1 << bit
    assert_message_or_message_error(bytes(broken))


@pytest.mark.parametrize(("data", "decode"), [*zip(FRAMES, (decode_task, decode_reply), strict=True)])
def test_a_frame_that_is_cut_off_anywhere_is_refused(data: bytes, decode: Any) -> None:
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([REPLY, TASK]), st.dictionaries(st.sampled_from(sorted(REPLY | TASK)), json_values))
def test_headers_of_any_json_raise_nothing_else(header: dict[str, Any], changes: dict[str, Any]) -> None:
    assert_message_or_message_error(frame({**header, **changes}, adapters.encode(ADAPTER)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_a_number_is_not_sent(bad: float) -> None:
    with pytest.raises(MessageError, match=r"metrics\.loss\.sum"):
        encode_reply(ClientReply("f", "a", 2, None, 0, {"loss": Metric(bad, 1)}))


def test_a_message_that_cannot_be_read_again_is_not_sent() -> None:
    with pytest.raises(MessageError, match="client"):
        encode_task(ClientTask("f", "a" * 65, 2, ADAPTER))
    with pytest.raises(MessageError, match="num_records"):
        encode_reply(ClientReply("f", "a", 2, ADAPTER, MAX_RECORDS + 1))
    with pytest.raises(MessageError, match="metrics"):
        encode_reply(ClientReply("f", "a", 2, None, 0, {"a record's text": Metric(1.0)}))  # type: ignore[dict-item]


# --- privacy


def test_no_field_of_a_reply_can_hold_a_list_or_a_text_of_any_length() -> None:
    """By type: two short names, a round, an adapter, a count, and sums under names from a closed list."""
    types = {field.name: field.type for field in fields(ClientReply)}
    assert types == {
        "federation": str,
        "client": str,
        "round": int,
        "adapter": messages.Adapter | None,
        "num_records": int,
        "metrics": messages.Mapping[MetricName, Metric],
    }
    assert {field.name: field.type for field in fields(Metric)} == {"sum": float, "count": int}


# in marks that no frame holds by itself, so that a hit is one
texts = st.lists(st.text(min_size=8, max_size=30).map(lambda text: f"«{text}»"), min_size=2, max_size=6)


def site_of(given_texts: list[str], config: Any) -> tuple[ClientState, list[str]]:
    """A site whose tokens are its texts' bytes, and the texts."""
    halves = [Record(text, text[::-1]) for text in given_texts]
    examples = {
        record.id: Example(
            record.id,
            np.frombuffer(f"{record.instruction}\n{record.response}".encode(), np.uint8).astype(np.int64),
            len(record.instruction.encode()) + 1,
        )
        for record in with_ids(halves)
    }
    validation = tuple(examples.values())[:2]
    return ClientState("a", "f", config, examples, validation), [text for half in halves for text in _of(half)]


def _of(record: Record) -> tuple[str, str]:
    return record.instruction, record.response


def forms_of_text(text: str) -> set[bytes]:
    escaped = (json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False))
    tokens = np.frombuffer(text.encode(), np.uint8)
    as_arrays = (tokens.astype(kind).tobytes() for kind in (np.int64, np.int32, np.float32))
    return {text.encode(), text.encode("utf-16-le"), *(form.encode() for form in escaped), *as_arrays}


def forms_of_number(number: float) -> set[bytes]:
    if not math.isfinite(number) or number == 0:
        return set()
    packed = {struct.pack(f"{order}{kind}", number) for order in "<>" for kind in "df" if abs(number) < 3e38}
    return {*packed, repr(number).encode()}


def found_in(data: bytes, secrets: Iterable[str], figures: Iterable[float]) -> list[bytes]:
    forbidden = {form for text in secrets for form in forms_of_text(text)}
    forbidden |= {form for figure in figures for form in forms_of_number(figure)}
    return [form for form in forbidden if form in data]


def figures_of(nll: Nll) -> tuple[float, ...]:
    return nll.sum, nll.mean, math.exp(min(nll.mean, 700.0))


@given(texts, st.integers(0, 2**32), st.sampled_from([0, 1, 2]), st.sampled_from([1, 2, 32]))
def test_a_reply_holds_no_text_no_record_id_and_no_figure_of_a_record(
    fakes: Any, given_texts: list[str], salt: int, max_steps: int, batch_size: int
) -> None:
    """A client answers for a whole federation; each reply is searched for any figure or text of a single record.

    A float32 of a drawn adapter can equal a figure's four bytes by chance, and has done so.
    So a find counts only when other draws with the same records have one too: a leak does not depend on the draw.
    """
    knobs = (f"training.max_steps={max_steps}", f"training.batch_size={batch_size}")
    config = fakes.config("federation.rounds=2", "personalization.epochs=2", *knobs)
    assert not all(leaks(fakes.dice(salt + draw), config, given_texts) for draw in range(3))


def leaks(model: Any, config: Config, given_texts: list[str]) -> list[bytes]:
    """Secrets and figures of records in the replies of one client over a whole federation."""
    state, secrets = site_of(given_texts, config)
    replies = []
    received = {number: model.fresh(number) for number in range(-1, 3)}
    for number, adapter in received.items():
        reply, state = handle(ClientTask("f", "a", number, adapter, restart=number == 0), state, model)
        replies.append(reply)
    own = [reply.adapter for reply in replies if reply.adapter is not None]
    examples = tuple(state.training.values())
    measured = [nll for adapter in (*received.values(), *own) for nll in model.nll(adapter, examples, "all")]
    figures = {figure for nll in measured for figure in figures_of(nll)}
    figures |= {value for entry in state.ledger for value in (entry.score, entry.nll_local) if value is not None}
    texts_of_site = [*secrets, *state.training]
    return [form for reply in replies for form in found_in(encode_reply(reply), texts_of_site, figures)]


@pytest.mark.parametrize(
    "leak",
    [
        {"client": "my secret"},
        {"client": "my \u20ac secret"},
        {"metrics": {"loss": Metric(1.2345678)}},
        {"adapter": {"x": np.array([1.2345678], np.float32)}},
        {"adapter": {"x": np.frombuffer(b"my secret", np.uint8).astype(np.float32)}},
        {"adapter": {"my secret": np.zeros(1, np.float32)}},
    ],
)
def test_the_search_would_find_it(leak: dict[str, Any]) -> None:
    fields_of_reply: dict[str, Any] = {"federation": "f", "client": "a", "round": 0, "adapter": None, "num_records": 1}
    data = encode_reply(ClientReply(**{**fields_of_reply, **leak}))
    assert found_in(data, ["my secret", "my \u20ac secret"], [1.2345678])


# --- a greeting, and the facts of a site


def test_a_greeting_and_its_answers_come_back() -> None:
    facts = Facts("f", "a", "0.1.0", "model", "prompt", {"lora.r": "8", "lora.targets": '["q_proj"]'}, 3, 4)
    assert decode_request(encode_hello(Hello("f", -1))) == Hello("f", -1)
    assert decode_answer(encode_facts(facts)) == facts
    for code in get_args(TroubleCode):
        assert decode_answer(encode_trouble(Trouble("a", code))) == Trouble("a", code)


def test_tasks_and_replies_are_requests_and_answers_too() -> None:
    task, reply = ClientTask("f", "a", 0, ADAPTER), ClientReply("f", "a", 0, ADAPTER, 3)
    request, answer = decode_request(encode_task(task)), decode_answer(encode_reply(reply))
    assert isinstance(request, ClientTask) and adapters.encode(request.adapter) == adapters.encode(ADAPTER)
    assert isinstance(answer, ClientReply) and answer.num_records == 3


def test_trouble_has_no_room_for_words() -> None:
    frame = encode_trouble(Trouble("a", "disk"))
    with pytest.raises(MessageError, match="code"):
        decode_answer(frame.replace(b'"disk"', b'"sick"'))
    with pytest.raises(MessageError, match="a field"):
        decode_answer(struct.pack("<4sI", b"FMD1", 52) + b'{"kind":"trouble","client":"a","code":"disk","x":"y"}'[:52])
    with pytest.raises(MessageError):
        encode_trouble(Trouble("a" * 65, "disk"))


@pytest.mark.parametrize("frame", [encode_hello(Hello("f", 0)), encode_trouble(Trouble("a", "disk"))])
def test_a_frame_with_bytes_after_its_end_is_refused(frame: bytes) -> None:
    decode = decode_request if b"hello" in frame else decode_answer
    with pytest.raises(MessageError, match="after its end"):
        decode(frame + b"x")


@given(st.binary(max_size=200))
def test_noise_is_not_a_message(data: bytes) -> None:
    for decode in (decode_request, decode_answer, split_frame):
        with pytest.raises(MessageError):
            decode(data)
        framed = struct.pack("<4sI", b"FMD1", len(data)) + data
        if decode is not split_frame:
            with pytest.raises(MessageError):
                decode(framed)


def test_a_frame_has_a_head_of_its_own_and_an_adapter() -> None:
    frames = [encode_task(ClientTask("f", name, 0, ADAPTER)) for name in "ab"]
    heads, payloads = zip(*map(split_frame, frames), strict=True)
    assert heads[0] != heads[1]
    assert payloads[0] == payloads[1] == adapters.encode(ADAPTER)
    assert [head + payload for head, payload in zip(heads, payloads, strict=True)] == frames


def test_an_adapter_in_successive_tasks_is_encoded_once_and_frames_are_as_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = {name: array + 1 for name, array in ADAPTER.items()}
    asked = [
        ClientTask("f", name, 0, adapter)
        for name, adapter in zip("abcd", [ADAPTER, ADAPTER, other, ADAPTER], strict=True)
    ]
    alone = [encode_task(task) for task in asked]
    encoded: list[object] = []
    encode = adapters.encode
    monkeypatch.setattr(adapters, "encode", lambda adapter: encoded.append(adapter) or encode(adapter))
    assert list(encode_tasks(asked)) == alone
    assert len(encoded) == 3
