"""Changes of clients that a study asks for: each dealt out into several, or responses swapped at some.

Both draw from streams named by client, so that other clients stay as they were; the clients that are noisy at a number
are noisy at a larger one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from fedmide.data.records import ClientData, Record, client_data
from fedmide.data.split import grouped
from fedmide.errors import DataError
from fedmide.seeds import entropy, stream


def pieces(client: ClientData, number: int, seed: int) -> tuple[ClientData, ...]:
    """So many clients in place of one, each with about as many of the records of every part.

    Groups of records (`split.grouped`) stay whole and within their part. A `DataError` where they are too few for
    every piece to have training records.
    """
    if number == 1:
        return (client,)
    parts = {"training": client.training, "validation": client.validation, "test": client.test}
    names = iter(grouped([record for records in parts.values() for record in records]))
    groups = {part: list(islice(names, len(records))) for part, records in parts.items()}
    sizes = {part: Counter(dict.fromkeys(range(number), 0)) for part in parts}
    home: dict[str, int] = {}
    for part in parts:
        members = Counter(groups[part])
        for name in sorted(members, key=lambda each: (-members[each], entropy(seed, "pieces", client=each))):
            home.setdefault(name, min(range(number), key=lambda piece: (sizes[part][piece], piece)))
            sizes[part][home[name]] += members[name]
    if not all(sizes["training"].values()):
        raise DataError(
            f"client {client.name!r}: its training records have fewer groups that must stay together than "
            f"data.pieces = {number}",
            "Set a smaller data.pieces",
        )

    def of(piece: int, part: str) -> list[Record]:
        return [record for record, name in zip(parts[part], groups[part], strict=True) if home[name] == piece]

    return tuple(
        client_data(f"{client.name}-{piece + 1}", *(of(piece, part) for part in parts)) for piece in range(number)
    )


def noisy(clients: Sequence[ClientData], number: int, seed: int) -> tuple[ClientData, ...]:
    """The clients, of which so many have wrong labels: each training record has the response of another one."""
    if number > len(clients):
        raise DataError(f"data.noisy_clients = {number}: there are {len(clients)} clients", "Set at most so many")
    chosen = sorted(clients, key=lambda client: entropy(seed, "noisy", client=client.name))[:number]
    names = {client.name for client in chosen}
    return tuple(_swapped(client, seed) if client.name in names else client for client in clients)


def _swapped(client: ClientData, seed: int) -> ClientData:
    """The client with its training records' responses handed on along a circle through all of them."""
    order = stream(seed, "swapped responses", client=client.name).permutation(len(client.training)).tolist()
    taken = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    training = [
        replace(record, response=client.training[taken[place]].response) for place, record in enumerate(client.training)
    ]
    return client_data(client.name, training, client.validation, client.test)
