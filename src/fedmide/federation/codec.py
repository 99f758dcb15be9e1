"""Messages as bytes: a JSON header that is checked, then the adapter as safetensors."""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmide.errors import MessageError
from fedmide.federation.messages import (
    MAX_RECORDS,
    ClientReply,
    ClientTask,
    Facts,
    Hello,
    Metric,
    MetricName,
    SiteAnswer,
    Trouble,
    TroubleCode,
)
from fedmide.model import adapters

MAGIC = b"FMD1"


MAX_HEADER_BYTES = 65_536


_LENGTH = struct.Struct("<I")


_Short = Annotated[str, Field(max_length=64)]


class _Strict(BaseModel):
    """A header: exactly these fields, of exactly these types, each bounded. Messages themselves have no bounds."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Header(_Strict):
    federation: _Short
    client: _Short
    round: int


class _TaskHeader(_Header):
    kind: Literal["task"]
    restart: bool
    train: bool


class _MetricHeader(_Strict):
    sum: Annotated[float, Field(allow_inf_nan=False)]
    count: Annotated[int, Field(ge=0)]


class _ReplyHeader(_Header):
    kind: Literal["reply"]
    num_records: Annotated[int, Field(ge=0, le=MAX_RECORDS)]
    has_adapter: bool
    metrics: dict[MetricName, _MetricHeader]


class _HelloHeader(_Strict):
    kind: Literal["hello"]
    federation: _Short
    round: int


class _FactsHeader(_Strict):
    kind: Literal["facts"]
    federation: _Short
    client: _Short
    version: _Short
    model: _Short
    prompt: _Short
    knobs: Annotated[dict[_Short, Annotated[str, Field(max_length=1024)]], Field(max_length=256)]
    shared: int
    personal: int


class _TroubleHeader(_Strict):
    kind: Literal["trouble"]
    client: _Short
    code: TroubleCode


def encode_hello(hello: Hello) -> bytes:
    """The frame of a hello."""
    return _frame(_checked(_HelloHeader, kind="hello", **asdict(hello)), b"")


def encode_facts(facts: Facts) -> bytes:
    """The frame of a site's facts."""
    return _frame(_checked(_FactsHeader, kind="facts", **asdict(facts)), b"")


def encode_trouble(trouble: Trouble) -> bytes:
    """The frame of a site's trouble."""
    return _frame(_checked(_TroubleHeader, kind="trouble", **asdict(trouble)), b"")


def decode_request(data: bytes) -> Hello | ClientTask:
    """The server's request in a frame; raises `MessageError`."""
    text, payload = _unframe(data)
    if _kind(text) != "hello":
        return decode_task(data)
    header = _validated(_HelloHeader, text)
    _check_end(payload)
    return Hello(header.federation, header.round)


def decode_answer(data: bytes) -> SiteAnswer:
    """A site's answer in a frame; raises `MessageError`."""
    text, payload = _unframe(data)
    kind = _kind(text)
    if kind == "facts":
        _check_end(payload)
        return Facts(**_validated(_FactsHeader, text).model_dump(exclude={"kind"}))
    if kind == "trouble":
        _check_end(payload)
        return Trouble(**_validated(_TroubleHeader, text).model_dump(exclude={"kind"}))
    return decode_reply(data)


def split_frame(data: bytes) -> tuple[bytes, bytes]:
    """The header and the adapter bytes of a frame.

    Adapter bytes are often the same for all sites, so a transport can send them once.

    >>> b"".join(split_frame(encode_hello(Hello("f", 0)))) == encode_hello(Hello("f", 0))
    True
    """
    _, payload = _unframe(data)
    return data[: len(data) - len(payload)], payload


def _kind(text: bytes) -> str:
    """The kind of frame that a header names, which need not exist; empty if it names none."""
    try:
        return str(json.loads(text).get("kind"))
    except (ValueError, AttributeError, RecursionError):
        return ""


def _check_end(payload: bytes) -> None:
    if payload:
        raise MessageError("a message has bytes after its end")


def encode_task(task: ClientTask) -> bytes:
    """The task's frame; raises `MessageError` if a name in it is too long to be read again."""
    return next(encode_tasks([task]))


def encode_tasks(tasks: Iterable[ClientTask]) -> Iterator[bytes]:
    """The tasks' frames. The same adapter in successive tasks is encoded once, as when all clients get one adapter."""
    adapter, payload = None, b""
    for task in tasks:
        header = _checked(
            _TaskHeader,
            kind="task",
            federation=task.federation,
            client=task.client,
            round=task.round,
            restart=task.restart,
            train=task.train,
        )
        if task.adapter is not adapter:
            adapter, payload = task.adapter, adapters.encode(task.adapter)
        yield _frame(header, payload)


def decode_task(data: bytes) -> ClientTask:
    """The task in a frame; raises `MessageError`."""
    text, payload = _unframe(data)
    header = _validated(_TaskHeader, text)
    return ClientTask(
        header.federation,
        header.client,
        header.round,
        adapters.decode(payload),
        header.restart,
        header.train,
    )


def encode_reply(reply: ClientReply) -> bytes:
    """The reply's frame; raises `MessageError` if a metric is not finite."""
    header = _checked(
        _ReplyHeader,
        kind="reply",
        federation=reply.federation,
        client=reply.client,
        round=reply.round,
        num_records=reply.num_records,
        has_adapter=reply.adapter is not None,
        metrics={name: {"sum": metric.sum, "count": metric.count} for name, metric in reply.metrics.items()},
    )
    return _frame(header, adapters.encode(reply.adapter) if reply.adapter is not None else b"")


def decode_reply(data: bytes) -> ClientReply:
    """The reply in a frame; raises `MessageError`. Its content is not checked here, see `server.refusal`."""
    text, payload = _unframe(data)
    header = _validated(_ReplyHeader, text)
    if not header.has_adapter:
        _check_end(payload)
    return ClientReply(
        header.federation,
        header.client,
        header.round,
        adapters.decode(payload) if header.has_adapter else None,
        header.num_records,
        {name: Metric(metric.sum, metric.count) for name, metric in header.metrics.items()},
    )


def _frame(header: BaseModel, payload: bytes) -> bytes:
    text = header.model_dump_json().encode()
    return MAGIC + _LENGTH.pack(len(text)) + text + payload


def _unframe(data: bytes) -> tuple[bytes, bytes]:
    start = len(MAGIC) + _LENGTH.size
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise MessageError("not a fedmide message")
    (length,) = _LENGTH.unpack(data[len(MAGIC) : start])
    if length > MAX_HEADER_BYTES or start + length > len(data):
        raise MessageError("a message's header is cut off or too long")
    return data[start : start + length], data[start + length :]


H = TypeVar("H", bound=BaseModel)


def _checked(header: type[H], **fields: object) -> H:
    try:
        return header.model_validate(fields)
    except ValidationError as error:
        raise MessageError(f"a message can't be sent: {_first(error)}") from None


def _validated(kind: type[H], text: bytes) -> H:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise MessageError(f"a message's header is wrong: {_first(error)}") from None


_HEADERS = (_TaskHeader, _ReplyHeader, _MetricHeader, _HelloHeader, _FactsHeader, _TroubleHeader)


_FIELDS = frozenset({*(name for header in _HEADERS for name in header.model_fields), *get_args(MetricName)})


def _first(error: ValidationError) -> str:
    """The field of the first problem, and the problem; nothing that the sender chose is repeated."""
    details = error.errors(include_input=False, include_url=False)[0]
    known = [str(part) for part in details["loc"] if part in _FIELDS]
    return f"{'.'.join(known) or 'a field'}: {details['msg']}"
