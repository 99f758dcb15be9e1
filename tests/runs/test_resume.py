"""A run that is stopped anywhere and resumed ends with the same bytes as a run that was never stopped.

A stopped process leaves the run folder in its state between two system calls. So these tests watch one run, keep the
state of the folder before every such call, and resume a run from each of these states. The model is made of dice: its
figures depend on all of its input, so lost or repeated work shows. Tests that kill a run of a real model are `slow`.
"""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedmide.config import Config, load
from fedmide.data.records import ClientData
from fedmide.data.tokens import Example
from fedmide.errors import RunFolderError
from fedmide.evaluation.measure import Measured
from fedmide.model import adapters
from fedmide.model.interface import Adapter
from fedmide.runs import measuring, opening, stages
from fedmide.runs.inputs import Inputs, read

STAGES = (stages.train, stages.personalize, stages.generate, stages.evaluate)
CHANGING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

Lasting = Callable[[Path], dict[str, Any]]
State = dict[str, bytes | None]
"""The state of a folder: the content of each file by its path, None for a folder."""


@dataclass
class Watch:
    """The states of a folder over time, and the files that are opened for writing. Only one watches at a time."""

    folder: Path
    states: list[State] = field(default_factory=list)
    written: set[str] = field(default_factory=set)

    def look(self) -> None:
        state = snapshot(self.folder)
        if not self.states or state != self.states[-1]:
            self.states.append(state)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGING and str(self.folder) in str(args):
            watching.clear()  # reading the state opens files too
            if event == "open" and set("wax+") & set(str(args[1])):
                self.written.add(Path(str(args[0])).name)
            self.look()
            watching.append(self)


watching: list[Watch] = []


def hear(event: str, args: tuple[Any, ...]) -> None:
    if watching:
        watching[0].hear(event, args)


@contextmanager
def watched(folder: Path) -> Iterator[Watch]:
    if not hear_added:
        sys.addaudithook(hear)
        hear_added.append(True)
    watch = Watch(folder)
    watching.append(watch)
    try:
        yield watch
    finally:
        watching.clear()
        watch.look()


hear_added: list[bool] = []


def snapshot(folder: Path) -> State:
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def restore(state: State, folder: Path) -> Path:
    folder.mkdir()
    for name, data in state.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder


def torn(states: Sequence[State]) -> Iterator[State]:
    """The states in between, in which half of a file was written."""
    for before, after in pairwise(states):
        for name, data in after.items():
            if data and (is_aside(name) or name == "events.jsonl") and before.get(name) != data:
                yield {**before, name: data[: (len(data) + len(before.get(name) or b"")) // 2]}


class OneByOne:
    """Writes the sites' files one after the other, because the watcher of the folder follows one write at a time."""

    def __init__(self, number: int) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def submit(self, write: Callable[..., None], *args: Any) -> Future[None]:
        done: Future[None] = Future()
        try:
            done.set_result(write(*args))
        except RunFolderError as error:
            done.set_exception(error)
        return done


@pytest.fixture(autouse=True)
def _one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ThreadPoolExecutor", OneByOne)


# --- a run whose model is dice


@dataclass
class DiceResident:
    """A resident model made of dice."""

    dice: Any
    config: Config
    model: Any
    heard: Any = None
    seconds: Counter[str] = field(default_factory=Counter)

    def fresh(self, seed: int) -> Adapter:
        return self.dice.fresh(seed)  # type: ignore[no-any-return]

    def nll(self, *args: Any) -> Any:
        return self.dice.nll(*args)

    def train(self, *args: Any) -> Any:
        return self.dice.train(*args)

    def generate(self, adapter: Adapter, examples: Sequence[Example], longest: int) -> tuple[str, ...]:
        data = adapters.encode(adapter)
        return tuple(hashlib.sha256(data + example.ids.tobytes()).hexdigest()[:longest] for example in examples)


@dataclass(frozen=True)
class DiceRun:
    """A run that can be started in any folder, and resumed."""

    config: Config
    begin: Callable[[], Inputs]

    def go_on(self, path: Path, stages_ahead: Sequence[Callable[[opening.Run], object]] = STAGES) -> Path:
        """Does what `fedmide run` does, or `fedmide run --resume` if there is a run; or single stages in turn."""
        begun = (path / "config.toml").exists()
        with opening.resume(path) if begun else opening.start(self.config, path) as run:
            for stage in stages_ahead:
                stage(run)
        return path


@pytest.fixture(scope="module")
def real_inputs(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any], one_thread: None
) -> Inputs:
    given = small_input_at(tmp_path_factory.mktemp("dice") / "input")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        return read(load(given.config, ["federation.participation=0.5", "federation.rounds=2"]))


@pytest.fixture
def dice_run(real_inputs: Inputs, fakes: Any, monkeypatch: pytest.MonkeyPatch) -> DiceRun:
    def begin() -> Inputs:
        dice = fakes.dice(odd=0.1)
        model = LikeAModel(real_inputs.resident.model, {name: each.shape for name, each in dice.fresh(0).items()})
        resident: Any = DiceResident(dice, real_inputs.resident.config, model)
        return replace(real_inputs, resident=resident)

    def measure(model: Any, adapter: Adapter, encode: Any, client: ClientData, config: Config) -> Measured:
        nll = fakes.dice().nll(adapter, real_inputs.examples[client.name].test, "response")
        return Measured((), tuple(each.sum for each in nll), (), (), (), 0)

    def summarize(
        config: Config, measured: Any, sets: Any, predictions: Any, events: Any, prompt: str
    ) -> dict[str, Any]:
        stages_of = {name: {stage: asdict(each) for stage, each in row.items()} for name, row in measured.items()}
        return {
            "measured": stages_of,
            "sets": sets,
            "predictions": predictions,
            "prompt": prompt,
            "rounds": len(events),
        }

    monkeypatch.setattr(opening, "read", lambda *_, **__: begin())
    # these figures have no side effects, and are slow in comparison with dice
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(stages.summary, "summarize", summarize)
    monkeypatch.setattr(stages.summary, "set_figures", lambda ledger, records: {"entries": len(ledger)})
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return DiceRun(real_inputs.resident.config, begin)


@dataclass(frozen=True)
class LikeAModel:
    """The parts of a model that stages read."""

    real: Any
    shapes: Any

    @property
    def lora(self) -> Any:
        return self.real.lora

    @property
    def tokenizer(self) -> Any:
        return self.real.tokenizer

    @property
    def num_positions(self) -> Any:
        return self.real.num_positions

    @property
    def prefix_bytes(self) -> int:
        return 0


# --- stopped between any two calls


def test_a_run_resumes_from_every_state_that_a_stop_can_leave(
    dice_run: DiceRun, tmp_path: Path, lasting: Lasting
) -> None:
    with watched(tmp_path / "whole") as watch:
        dice_run.go_on(tmp_path / "whole")
    expected = lasting(tmp_path / "whole")
    states = [*watch.states, *torn(watch.states)]
    assert len(states) > 100, "else little was seen"
    for number, state in enumerate(states):
        path = restore(state, tmp_path / f"stopped-{number}")
        ahead = STAGES[1:] if "adapter" in state else STAGES  # a trained run resumes with any stage
        assert lasting(dice_run.go_on(path, ahead)) == expected, f"stopped at {number} of {len(states)}"


def test_only_temporary_files_and_the_events_are_opened_for_writing(dice_run: DiceRun, tmp_path: Path) -> None:
    with watched(tmp_path / "whole") as watch:
        dice_run.go_on(tmp_path / "whole")
    plain = {name for name in watch.written if not (name.startswith(".") and name.endswith(".partial"))}
    inside = {"adapter.safetensors", "state.json", "adapter_config.json", "adapter_model.safetensors"}
    assert plain == {".lock", "events.jsonl"} | inside, "those inside are written into a folder aside"
    for before, after in pairwise(watch.states):
        for name in inside:
            changed = [path for path in after if path.endswith(f"/{name}") and before.get(path) != after[path]]
            appeared_whole = all(after[path] for path in changed if not is_aside(path))
            assert appeared_whole


def is_aside(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def test_a_run_that_is_stopped_again_and_again_ends_the_same(
    dice_run: DiceRun, tmp_path: Path, lasting: Lasting
) -> None:
    expected = lasting(dice_run.go_on(tmp_path / "whole"))
    draw = random.Random(0)
    for chain in range(3):
        state: State = {}
        for link in range(3):
            path = restore(state, tmp_path / f"{chain}-{link}")
            with watched(path) as watch:
                assert lasting(dice_run.go_on(path)) == expected
            state = draw.choice(watch.states)


# --- stopped by the disk, by the user, by a fault


def test_a_run_resumes_after_the_disk_was_full_at_any_file(
    dice_run: DiceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: Lasting
) -> None:
    expected = lasting(dice_run.go_on(tmp_path / "whole"))
    for number in range(1, 10_000):
        path = tmp_path / f"full-{number}"
        with monkeypatch.context() as patch:
            files = FullDisk(number)
            patch.setattr(os, "fsync", files)
            if files.fits(lambda path=path: dice_run.go_on(path)):  # type: ignore[misc]
                break
        assert lasting(dice_run.go_on(path)) == expected
    assert number > 30, "else little was seen"


@dataclass
class FullDisk:
    """A disk without room for its n-th file and all later ones, until it is reset."""

    number: int
    seen: int = 0

    def __call__(self, descriptor: int) -> None:
        self.seen += not Path(f"/proc/self/fd/{descriptor}").is_dir()
        if self.seen >= self.number:
            raise OSError(errno.ENOSPC, "No space left on device")

    def fits(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except RunFolderError as error:
            assert "no room on disk" in str(error)
            return False
        return True


def test_a_run_resumes_after_an_interrupt_at_any_training(dice_run: DiceRun, tmp_path: Path, lasting: Lasting) -> None:
    expected = lasting(dice_run.go_on(tmp_path / "whole"))
    for number in range(1, 10_000):
        path = tmp_path / f"interrupted-{number}"
        try:
            with opening.start(dice_run.config, path) as run:
                for stage in STAGES:
                    stage(interrupted(run, number))
        except KeyboardInterrupt:
            assert run.folder.read_manifest()["status"] != "evaluated"
        else:
            break
        assert lasting(dice_run.go_on(path)) == expected
    assert number > 4, "else little was seen"


def interrupted(run: opening.Run, number: int) -> opening.Run:
    """The same run, whose model is interrupted at its n-th training in each stage."""
    trained = 0

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(run.inputs.resident, name)

        def train(self, *args: Any) -> Any:
            nonlocal trained
            trained += 1
            if trained == number:
                raise KeyboardInterrupt
            return run.inputs.resident.train(*args)

    resident: Any = Interrupted()
    return replace(run, inputs=replace(run.inputs, resident=resident))


# --- killed for real


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12's, where threads of others run
def test_a_real_run_killed_at_random_moments_ends_with_the_same_bytes(
    small_input: Any, tmp_path: Path, lasting: Lasting
) -> None:
    config = load(small_input.config)
    begun = time.perf_counter()
    whole = forked(config, tmp_path / "whole", None)
    seconds = time.perf_counter() - begun
    assert whole == 0
    expected = lasting(tmp_path / "whole")
    draw, kills, number = random.Random(1), 0, 0
    while (
        number < 6 or kills < 4
    ):  # if other processes slowed the first run down, few of the next ones are killed in time
        path = tmp_path / f"killed-{number}"
        while forked(config, path, draw.uniform(0, seconds)) != 0:
            kills += 1
        assert lasting(path) == expected
        number += 1
        assert number < 50, "nothing was killed"


def forked(config: Config, path: Path, kill_after: float | None) -> int:
    """The exit status of a child process that starts or resumes a run, and is killed after `kill_after` seconds."""
    child = os.fork()
    if not child:
        try:
            begun = (path / "config.toml").exists()
            with opening.resume(path) if begun else opening.start(config, path) as run:
                for stage in STAGES:
                    stage(run)
        except BaseException:  # noqa: BLE001 - the child must not continue with the test itself
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def heeds_interrupts() -> None:
    """Undoes a setting of shells: their background jobs ignore SIGINT, and so would a child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_resumes_after_its_process_was_stopped(
    how: signal.Signals, small_input: Any, tmp_path: Path, lasting: Lasting
) -> None:
    command = [sys.executable, "-c", "from fedmide.cli import main; main()", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    new = [*command, str(small_input.config), "--set", "federation.rounds=8"]  # long enough to be stopped
    whole = [*new, "--out", str(tmp_path / "whole")]
    assert subprocess.run(whole, env=environment, capture_output=True, check=False).returncode == 0
    path = tmp_path / "stopped"
    with subprocess.Popen(
        [*new, "--out", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_interrupts,  # noqa: PLW1509
    ) as process:
        while not (path / "server" / "round-000").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in told
    assert ("fedmide: stopped" in told) == (how == signal.SIGINT)
    assert not (path / "metrics.json").exists()
    done = subprocess.run(
        [*command, "--resume", str(path), "--json"], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["status"] == "evaluated"
    assert lasting(path) == lasting(tmp_path / "whole")
