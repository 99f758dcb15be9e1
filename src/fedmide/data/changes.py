"""Changes of clients that a study asks for: each split into several, or responses swapped at some.

Both draw from random streams named by client, so other clients stay unchanged. If `data.noisy_clients` grows, the
clients that were noisy stay noisy.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from fedmide.data.records import ClientData, Part, Record, client_data
from fedmide.data.split import grouped
from fedmide.errors import DataError
from fedmide.seeds import entropy, stream


def pieces(client: ClientData, number: int, seed: int) -> tuple[ClientData, ...]:
    """Several clients (`number`) in place of one, each with about the same number of records of every part.

    Groups of records (`split.grouped`) stay whole and within their part. Raises `DataError` if there are too few groups
    to give every piece training records.
    """
    if number == 1:
        return (client,)
    parts = client.parts()
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
            f"site {client.name!r}: its training records form fewer groups, which must stay whole, than "
            f"data.pieces = {number}",
            "Set a smaller data.pieces",
        )

    def of(piece: int, part: Part) -> list[Record]:
        return [record for record, name in zip(parts[part], groups[part], strict=True) if home[name] == piece]

    return tuple(
        client_data(f"{client.name}-{piece + 1}", *(of(piece, part) for part in parts)) for piece in range(number)
    )


def noisy(clients: Sequence[ClientData], number: int, seed: int) -> tuple[ClientData, ...]:
    """The clients, `number` of them with wrong labels: each training record has the response of another one."""
    if number > len(clients):
        raise DataError(f"data.noisy_clients = {number}: there are {len(clients)} sites", f"Set at most {len(clients)}")
    chosen = sorted(clients, key=lambda client: entropy(seed, "noisy", client=client.name))[:number]
    names = {client.name for client in chosen}
    return tuple(_swapped(client, seed) if client.name in names else client for client in clients)


def _swapped(client: ClientData, seed: int) -> ClientData:
    """The client after its training records passed their responses on, along one random circle through all of them."""
    order = stream(seed, "swapped responses", client=client.name).permutation(len(client.training)).tolist()
    taken = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    training = [
        replace(record, response=client.training[taken[place]].response) for place, record in enumerate(client.training)
    ]
    return client_data(client.name, training, client.validation, client.test)
