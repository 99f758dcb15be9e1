from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config import Config
from fedmide.config.sections import DataConfig
from fedmide.data import load
from fedmide.data.changes import noisy, pieces
from fedmide.data.records import ClientData, Record, client_data
from fedmide.data.split import grouped
from fedmide.errors import DataError


def client(name: str, number: int, repeats: int = 1) -> ClientData:
    records = [Record(f"{name} {place // repeats}?", f"{name} {place}") for place in range(number)]
    held_out = [Record(f"{name} held out {place}?", f"{place}") for place in range(6)]
    return client_data(name, records, held_out[:2], held_out[2:])


@given(st.integers(1, 5), st.integers(5, 40), st.integers(1, 3), st.integers(0, 9))
def test_pieces_hold_every_record_once_and_keep_groups_whole(number: int, size: int, repeats: int, seed: int) -> None:
    whole = client("a", size, repeats)
    if -(-size // repeats) < number:
        with pytest.raises(DataError, match=r"data\.pieces"):
            pieces(whole, number, seed)
        return
    dealt = pieces(whole, number, seed)
    assert len(dealt) == number
    for part in ("training", "validation", "test"):
        texts = Counter(record.response for each in dealt for record in getattr(each, part))
        assert texts == Counter(record.response for record in getattr(whole, part))
    homes = [(place, record) for place, each in enumerate(dealt) for record in each.training]
    names = grouped([record for _, record in homes])
    assert len({(name, place) for name, (place, _) in zip(names, homes, strict=True)}) == len(set(names))
    sizes = [len(each.training) for each in dealt]
    assert max(sizes) - min(sizes) <= repeats


def test_one_piece_is_the_client_itself() -> None:
    assert pieces(client("a", 5), 1, 0) == (client("a", 5),)


@given(st.integers(0, 4), st.integers(0, 9))
def test_noise_swaps_training_responses_of_the_given_number_of_clients(number: int, seed: int) -> None:
    clients = [client(name, 7) for name in "abcd"]
    after = noisy(clients, number, seed)
    changed = [(old, new) for old, new in zip(clients, after, strict=True) if old != new]
    assert len(changed) == number
    for old, new in changed:
        assert [record.instruction for record in new.training] == [record.instruction for record in old.training]
        assert Counter(record.response for record in new.training) == Counter(
            record.response for record in old.training
        )
        assert all(one.response != two.response for one, two in zip(old.training, new.training, strict=True))
        assert (new.validation, new.test) == (old.validation, old.test)
        assert {record.id for record in new.training}.isdisjoint(record.id for record in old.training)
    if number:
        fewer = noisy(clients, number - 1, seed)
        assert all(one in (old, two) for old, one, two in zip(clients, fewer, after, strict=True))


def test_more_noisy_clients_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="there are 1 sites"):
        noisy([client("a", 3)], 2, 0)


def test_both_are_settings_of_the_data(small_input: Any) -> None:
    config = DataConfig(source="files", path=str(small_input.data), max_records=3)
    plain, dealt = load(config, 0), load(config.model_copy(update={"pieces": 2}), 0)
    assert [each.name for each in dealt] == [f"{each.name}-{piece}" for each in plain for piece in (1, 2)]
    assert [len(each.training) for each in (*plain, *dealt)] == [3] * 6
    changed = load(config.model_copy(update={"pieces": 2, "noisy_clients": 1}), 0)
    assert sum(one != two for one, two in zip(dealt, changed, strict=True)) == 1


def test_another_seed_of_the_run_has_the_same_records_where_the_data_has_its_own(small_input: Any) -> None:
    config = Config(data=DataConfig(source="files", path=str(small_input.data), max_records=3))
    own = config.model_copy(update={"data": config.data.model_copy(update={"seed": 5})})
    assert config.model_copy(update={"seed": 2}).data_seed == 2
    assert {each.model_copy(update={"seed": seed}).data_seed for each in (own,) for seed in (0, 1)} == {5}
    assert load(own.data, own.data_seed) != load(config.data, config.data_seed)
