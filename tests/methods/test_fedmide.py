"""FedMIDE on the server: the records behind the common adapter, sent only if they are needed."""

from typing import Any

import numpy as np
import pytest

from fedmide import methods
from fedmide.federation import server
from fedmide.federation.codec import encode_task
from fedmide.methods.fedmide import PROVENANCE, without_own
from fedmide.methods.method import Common, Contribution
from fedmide.model.interface import Adapter

FEDMIDE = methods.METHODS["fedmide"]


def adapter(value: float) -> Adapter:
    return {"x.lora_B.weight": np.full((2, 3), value, np.float32)}


def combined(fakes: Any, *answers: tuple[str, float, int], round_number: int = -1, override: str = "true") -> Common:
    config = fakes.config(f"scoring.without_own={override}")
    common = Common(("a", "b", "c"), round_number, adapter(0.0))
    after = FEDMIDE.combine(common, [Contribution(client, adapter(at), n) for client, at, n in answers], config)
    assert after is not None
    return Common(after.clients, round_number + 1, after.adapter, after.method_state)


def test_a_client_in_the_mean_receives_its_own_share_of_it(fakes: Any) -> None:
    config, common = fakes.config("scoring.without_own=true"), combined(fakes, ("a", 5.0, 3), ("b", 11.0, 6))
    down = FEDMIDE.down(common, "a", config)
    assert down[PROVENANCE].tolist() == [9, 3, -1]
    others = without_own(down, {-1: adapter(5.0)})
    assert np.array_equal(others["x.lora_B.weight"], adapter(11.0)["x.lora_B.weight"])
    assert FEDMIDE.down(common, "c", config) == common.adapter, "it is not in the mean"


def test_no_share_is_sent_in_the_last_stage_or_if_no_setting_needs_it(fakes: Any) -> None:
    config = fakes.config("scoring.without_own=true", "federation.rounds=3")
    common = combined(fakes, ("a", 5.0, 3), round_number=2)
    assert FEDMIDE.down(common, "a", config) == common.adapter
    assert combined(fakes, ("a", 5.0, 3), override="false").method_state == {}


def test_without_answers_the_earlier_account_stands(fakes: Any) -> None:
    config = fakes.config("scoring.without_own=true")
    assert FEDMIDE.combine(combined(fakes, ("a", 5.0, 3)), [], config) is None


@pytest.mark.parametrize("sizes", [(7, 4, 5), (7,), (7, 4)])
def test_without_the_own_adapter_is_the_mean_of_the_others_in_a_real_federation(
    run_federation: Any, sizes: tuple[int, ...]
) -> None:
    done = run_federation("fedmide", "scoring.without_own=true", "federation.rounds=1", sizes=sizes)
    own = done.replies(-1)["a"]
    first = server.plan(done.states[1], done.config)[0]
    others = without_own(first.adapter, {-1: own})
    replies, rest = done.replies(-1), dict(zip("bc", sizes[1:], strict=False)) or {"a": 7}
    for name, array in others.items():
        expected = sum(number * replies[each][name].astype(np.float64) for each, number in rest.items())
        assert np.allclose(array, expected / sum(rest.values()), atol=1e-6)


def test_the_defaults_send_the_published_bytes(fakes: Any) -> None:
    plain, asking = fakes.config(), fakes.config("scoring.without_own=true")
    state = server.begin("f", ["a", "b"], adapter(1.0), plain)
    frames = [[encode_task(task) for task in server.plan(state, config)] for config in (plain, asking)]
    assert frames[0] == frames[1], "before the first mean there is nothing to send"
    longer = [FEDMIDE.down(combined(fakes, ("a", 5.0, 3), override=each), "a", asking) for each in ("true", "false")]
    assert [set(each) - {"x.lora_B.weight"} for each in longer] == [{PROVENANCE}, set()]
