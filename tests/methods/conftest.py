"""Small federations with a real (tiny, random) model, whose value layers are not square: 64 in, 32 out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmide import methods
from fedmide.config import Config, apply_overrides, parse
from fedmide.data.tokens import Example
from fedmide.federation import server
from fedmide.federation.client_state import ClientState
from fedmide.federation.messages import ClientTask
from fedmide.federation.rounds import run
from fedmide.federation.runtimes.inprocess import InProcess
from fedmide.federation.server import Delivery, RoundSummary, ServerState
from fedmide.model.interface import Adapter, Epoch, TrainingPlan, rate_at
from fedmide.runs.resident import Resident, open_model

SMALL: dict[str, Any] = {
    "seed": 3,
    "model": {"name": "tiny-random", "dtype": "float32", "device": "cpu"},
    "lora": {"r": 2, "alpha": 4.0, "dropout": 0.0, "blocks": "top:2"},
    "training": {"batch_size": 4, "learning_rate": 1e-2},
    "federation": {"rounds": 2},
    "personalization": {"epochs": 2},
    "runtime": {"threads": 1},
}
SIZES = (7, 4, 5)
"""Training records of the clients a, b and c; they differ, so that weights show."""


@dataclass
class Federation:
    """A federation that has been run: the server's states round by round, every delivery, and the sites after it."""

    config: Config
    resident: Resident
    sites: dict[str, ClientState]
    states: list[ServerState]
    deliveries: list[Delivery] = field(default_factory=list)
    summaries: list[RoundSummary] = field(default_factory=list)

    @property
    def adapter(self) -> Adapter:
        """The last common adapter."""
        return self.states[-1].adapter

    def own(self, client: str) -> Adapter:
        """The client's tuned adapter."""
        adapter = self.sites[client].adapter
        assert adapter is not None
        return adapter

    def replies(self, number: int) -> dict[str, Adapter]:
        """The arrays that each client sent in a round."""
        found = [each.reply for each in self.deliveries if each.reply and each.reply.round == number]
        return {reply.client: reply.adapter for reply in found if reply.adapter is not None}


RunFederation = Callable[..., Federation]


@pytest.fixture(scope="session")
def run_federation(
    tiny_folder: Path, one_thread: None, random_examples: Callable[..., tuple[Example, ...]]
) -> RunFederation:
    """A function that runs a federation by its method, on some of the clients, and personalizes them.

    `failing`: (round, client) that can't be reached; `lost`: those that train, but whose reply does not arrive.
    """
    opened: dict[str, Resident] = {}

    def resident_of(config: Config) -> Resident:
        key = f"{methods.of(config).rank(config)}, {config.lora}"
        if key not in opened:
            opened[key] = open_model(config, tiny_folder)
        return replace(opened[key], config=config)

    def do(
        method: str,
        *overrides: str,
        sizes: Sequence[int] = SIZES,
        failing: Sequence[tuple[int, str]] = (),
        lost: Sequence[tuple[int, str]] = (),
    ) -> Federation:
        config = parse(apply_overrides({**SMALL, "method": method}, overrides))
        resident = resident_of(config)
        sites = {
            name: site(name, random_examples(size + 2, 8, 24, seed=number), size, config)
            for number, (name, size) in enumerate(zip("abcdefgh", sizes, strict=False))
        }
        states = [server.begin("f", sites, resident.fresh(config.seed), config)]
        federation = Federation(config, resident, sites, states)
        runtime = InProcess(sites, resident, lambda state: None)

        def deliver(tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
            for task in tasks:
                if (task.round, task.client) in failing:
                    delivery = Delivery(task.client, None, "the site can't be reached")
                else:
                    (delivery,) = runtime([task])
                    if (task.round, task.client) in lost:
                        delivery = replace(delivery, reply=None, problem="no reply arrived")
                federation.deliveries.append(delivery)
                yield delivery

        def commit(state: ServerState, summary: RoundSummary) -> None:
            states.append(state)
            federation.summaries.append(summary)

        last = run(states[0], config, deliver, commit)
        for _ in deliver(server.plan(last, config)):
            pass
        return federation

    return do


@pytest.fixture(scope="session")
def trained_by_hand(tiny_folder: Path, one_thread: None) -> Callable[..., None]:
    """A function that trains tensors in place in plain torch: one step per epoch, on all records of a site at once.

    `change` gives the change of a layer's output, from the layer's name and input.
    """
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).requires_grad_(False)

    def do(tensors: Sequence[Any], change: Callable[[str, Any], Any], names: Sequence[str], site: ClientState) -> None:
        settings, examples = site.config.training, list(site.training.values())
        assert settings.batch_size >= len(examples) and settings.weight_decay == site.config.lora.dropout == 0
        num_tokens = sum(len(example.ids) - 1 for example in examples)
        optimizer = torch.optim.AdamW(tensors, lr=settings.learning_rate, weight_decay=0.0)
        hooks = [
            base.get_submodule(name.removeprefix("base_model.model.")).register_forward_hook(
                lambda module, args, output, name=name: output + change(name, args[0])
            )
            for name in names
        ]
        for step in range(settings.epochs):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, settings.epochs, settings)
            optimizer.zero_grad()
            for example in examples:
                ids = torch.from_numpy(example.ids)[None]
                logits = base(input_ids=ids).logits[0, :-1]
                (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / num_tokens).backward()
            torch.nn.utils.clip_grad_norm_(tensors, settings.max_grad_norm)
            optimizer.step()
        for hook in hooks:
            hook.remove()

    return do


@pytest.fixture
def running_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A function that makes every training of a client in a round end in values that are not finite."""
    train = Resident.train

    def do(client: str, round_number: int) -> None:
        def diverging(self: Resident, adapter: Adapter, examples: Any, plan: TrainingPlan) -> Iterator[Epoch]:
            factor = np.float32(np.nan if (plan.client, plan.round_number) == (client, round_number) else 1)
            for epoch in train(self, adapter, examples, plan):
                yield replace(epoch, adapter={name: array * factor for name, array in epoch.adapter.items()})

        monkeypatch.setattr(Resident, "train", diverging)

    return do


def site(name: str, examples: Sequence[Example], size: int, config: Config) -> ClientState:
    """A site whose first records train and whose others validate."""
    return ClientState(name, "f", config, {each.id: each for each in examples[:size]}, examples[size:])


@pytest.fixture(scope="session")
def distance() -> Callable[[Adapter, Adapter], float]:
    """The largest difference between two adapters."""

    def measure(one: Adapter, two: Adapter) -> float:
        assert one.keys() == two.keys()
        return max((float(np.abs(one[name] - two[name]).max()) for name in one), default=0.0)

    return measure


@pytest.fixture(scope="session")
def product() -> Callable[..., dict[str, Any]]:
    """The weights' change that an adapter makes, scale left out: B A by the layer's name."""

    def multiply(adapter: Adapter) -> dict[str, Any]:
        names = [name for name in adapter if ".lora_A." in name]
        return {
            name.split(".lora_A.")[0]: adapter[name.replace("lora_A", "lora_B")].astype(float)
            @ adapter[name].astype(float)
            for name in names
        }

    return multiply
