"""Whatever dies: every sample trained once in each epoch of the surviving history, and nothing left behind.

Most cases run trainer and producers in this process, step by step, over the real datamodule, loader, stores and files;
only the target and the optimizer are arithmetic. A kill is an exception that nothing catches, and everything that was
in memory is thrown away. Real processes and servers are killed in the other files of this table.

    fault                                        tested by
    a producer dies: mid-put, before commit ...  here: a kill at any point, kills upon kills, again and again; SIGKILL
                                                 in test_disaggregated.py; over Mooncake in test_faults_servers.py
    the trainer dies: mid-step, mid-checkpoint,  here, the same; SIGKILL in test_disaggregated.py, test_equivalence.py
      between step and checkpoint
    one of two trainer ranks dies                test_disaggregated.py: two ranks (gloo) and two producers, ragged
    the metadata server dies, is started again   test_faults_servers.py: Redis, with its data, at any point; not
                                                 started again; with no data. SQLite: control_plane/test_metadata.py
    the owner and master of a store die          test_faults_servers.py: Mooncake, started again in the middle of a run
    a store or metadata server comes back empty  test_faults_servers.py; here: metadata is emptied
    a host is cut off for a while                test_several_hosts.py: producer, trainer, servers in turn
    a producer is started twice, commits twice   here
    the clock jumps                              here
    a disk is slow, full                         here; the stall's message in control_plane/test_stream.py
    features are cut off, changed, deleted       here
    a slow trainer; producers die with bytes     test_disaggregated.py; here: bytes stay within the limit
    any order of all that                        control_plane/test_controller.py: a state machine against a model
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules import DisaggregatedDataModule
from specforge.callbacks.resume import ExactResume
from specforge.contracts import CapturePolicy, PromptTask, Provenance, StrategySpec, TokenCounts, content_id
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from specforge.files import write_file
from specforge.inference.producer import Producer
from specforge.inference.rollout_worker import sample_id
from specforge.inference.target_engine import TargetEngine
from specforge.runtime.addresses import open_backend, open_metadata
from specforge.runtime.control_plane.controller import DataFlowController, load_ref
from specforge.runtime.control_plane.metadata import STATES, State
from specforge.runtime.data_plane.store import FeatureStore
from tests.disaggregated import control, places, stored_bytes

pytestmark = pytest.mark.faults

SAMPLES, EPOCHS, BATCH, ACCUMULATE, EVERY = 14, 2, 2, 2, 2
STEPS = EPOCHS * 4  # 7 batches in windows of 2
HIDDEN = 4


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Engine(TargetEngine):
    """A target of arithmetic: features depend on the tokens alone."""

    def __init__(self) -> None:
        """Needs no files."""

    def check(self, policy: CapturePolicy) -> None:
        pass

    def capture(self, input_ids, policy: CapturePolicy) -> list[dict[str, torch.Tensor]]:
        rows = [torch.tensor(ids, dtype=torch.float32) for ids in input_ids]
        return [{"last_hidden_states": torch.stack([(x * k).sin() for k in range(1, HIDDEN + 1)], 1)} for x in rows]


def prompt(index: int) -> PromptTask:
    ids = tuple((index * 7 + k) % 50 for k in range(3 + index % 5))
    mask = (0, *[1] * (len(ids) - 1))
    return PromptTask(content_id(list(ids), list(mask), index), ids, mask, f"line {index}")


class World:
    """A run's folder, its clock, its producers, and what is to go wrong."""

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        max_samples: int = 8,
        retain: str = "until_durable",
        max_bytes: int = 1 << 30,
        max_tries: int = 5,
        **where: str,
    ) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.where = places(folder) | where
        self.max_bytes, self.max_tries = max_bytes, max_tries
        self.now = 1000.0
        self.max_samples, self.retain = max_samples, retain
        self.countdown: dict[str, int] = {}
        self.strike: Callable[[str], None] = self.die
        self.history: list[tuple[int, tuple[int, str]]] = []
        self.producers: list[Producer] = []
        self.at_work = -1
        self.ended: list[str] = []  # what producers said that ended
        self.events: list[Callable[[], None]] = []
        self.deaths, self.engine, self.bad_samples = 0, Engine(), "error"
        if not (folder / "prompts").exists():
            counts = TokenCounts(torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64))
            PromptSet([prompt(i) for i in range(SAMPLES)], "t" * 8, counts).save(folder / "prompts" / "train")

    # What goes wrong.

    def at(self, point: str) -> None:
        """Something strikes here, if it is time."""
        if point in self.countdown:
            self.countdown[point] -= 1
            if self.countdown[point] < 0:
                del self.countdown[point]
                self.deaths += 1
                self.strike(point)

    def die(self, point: str) -> None:
        raise Killed(point)

    def hook(self, owner: object, name: str, before: str = "", after: str = "") -> None:
        """Die before or after a method of an object."""
        original = getattr(owner, name)

        def hooked(*args, **options):
            self.at(before)
            result = original(*args, **options)
            self.at(after)
            return result

        setattr(owner, name, hooked)

    # Producers.

    def start_producer(self, name: str) -> Producer:
        controller = DataFlowController(
            open_metadata(self.where["metadata"], create=True),
            FeatureStore(open_backend(self.where["store"], create=True)),
            clock=lambda: self.now,
            lease_seconds=10.0,
            max_tries=self.max_tries,
        )
        self.hook(controller.features.backend, "write", "before put", "after put")
        self.hook(controller, "commit", "before commit", "after commit")
        self.hook(controller, "lease", "", "after lease")
        producer = Producer(controller, lambda dtype: self.engine, "f" * 8, name, max_prompts=3)
        controller.release(name)
        return producer

    def produce(self, seconds: float) -> None:
        """What happens while the trainer waits: time passes, and one of the producers works."""
        self.now += 1.0
        self.at_work = at = self.random.randrange(len(self.producers))
        producer = self.producers[at]
        try:
            producer.once()
        except Killed:
            again = producer.owner if self.random.random() < 0.5 else f"{producer.owner}x"
            self.producers[at] = self.start_producer(again)
        except UserError as error:  # a full disk: the process ends in good order, and is started again
            self.ended.append(str(error))
            producer.controller.release(producer.owner)
            self.producers[at] = self.start_producer(producer.owner)
        for event in self.events:
            event()

    # The trainer.

    def train(self) -> torch.Tensor:
        """Train to the end, restarting after every death; returns the weights."""
        self.producers = [self.start_producer(f"p{i}") for i in range(2)]
        for _ in range(10):
            try:
                return self._attempt()
            except Killed:
                self.now += self.random.choice([0.0, 5.0, 30.0])
        raise AssertionError("it dies again and again")

    def _attempt(self) -> torch.Tensor:
        data, trainer = self._start()
        resume, loader = ExactResume(), data.train_dataloader()
        trainer.train_dataloader = loader
        trainer.num_training_batches = len(loader)
        weights = torch.zeros(HIDDEN, dtype=torch.float64)
        checkpoint = self.folder / "last.ckpt"
        if checkpoint.exists():
            saved = json.loads(checkpoint.read_text())
            trainer.global_step, weights = saved["step"], torch.tensor(saved["weights"], dtype=torch.float64)
            loader.load_state_dict(saved["loader"])
            self.history = [(step, key) for step, key in self.history if step <= saved["step"]]
        else:
            self.history = []
        resume.on_train_start(trainer, None)
        gradient, window = torch.zeros_like(weights), []
        while trainer.global_step < STEPS:
            for batch in loader:
                features = batch.features["last_hidden_states"].double()
                gradient = gradient + (features * batch.loss_mask[:, None]).sum(0)
                window += [(batch.cursor["epoch"], name) for name in batch.sample_ids]
                if batch.cursor["batch"] % ACCUMULATE == 0 or batch.cursor["batch"] == len(loader):
                    self.at("mid-step")
                    weights = weights * 0.9 + gradient * (1 + trainer.global_step)
                    trainer.global_step += 1
                    self.history += [(trainer.global_step, key) for key in window]
                    gradient, window = torch.zeros_like(weights), []
                    self.at("step done")
                resume.on_train_batch_end(trainer, None, None, batch, 0)
                self.at("step recorded")
                if not window and trainer.global_step % EVERY == 0:
                    state = {"step": trainer.global_step, "weights": weights.tolist(), "loader": loader.state_dict()}
                    write_file(checkpoint, json.dumps(state))
                    self.at("checkpoint complete")
                    loader.durable(trainer.global_step)
                    self.at("checkpoint durable")
        data.teardown("fit")
        return weights

    def _start(self) -> tuple[DisaggregatedDataModule, SimpleNamespace]:
        data = DisaggregatedDataModule(
            str(self.folder / "prompts"),
            **self.where,
            batch_size=BATCH,
            dtype="float32",
            prefetch=0,
            max_samples=self.max_samples,
            max_bytes=self.max_bytes,
            retain=self.retain,
            lease_seconds=10.0,
            max_tries=self.max_tries,
            low_water=1.0,
            bad_samples=self.bad_samples,
        )
        spec = StrategySpec("any", CapturePolicy(()), ("last_hidden_states",), 1, 1)
        target = SimpleNamespace(name="tiny", fingerprint="f" * 8, hidden_size=HIDDEN, compute_dtype=str)
        trainer = SimpleNamespace(
            global_rank=0,
            world_size=1,
            is_global_zero=True,
            global_step=0,
            max_steps=STEPS,
            max_epochs=None,
            accumulate_grad_batches=ACCUMULATE,
            log_every_n_steps=10**9,
            datamodule=data,
            lightning_module=SimpleNamespace(spec=spec, target=target, training_plan=lambda batch: None),
            strategy=SimpleNamespace(barrier=lambda name: None, root_device=torch.device("cpu"), model=None),
        )
        data.trainer = trainer
        data.setup("fit")
        controller, stream = data._controller, data._splits["train"][1]
        controller.clock, stream._wait = lambda: self.now, self.produce
        self.hook(controller, "rewind", "", "rewound")
        self.hook(controller, "forget", "before forgetting", "forgotten")
        self.hook(controller, "deliver", "", "delivered")
        self.hook(controller, "trained", "", "marked trained")
        self.hook(controller, "_mark_durable", "", "marked durable")
        self.hook(controller.features, "discard", "", "discarded")
        return data, trainer

    def check(self, weights: torch.Tensor, expected: torch.Tensor, durable: int | None = EPOCHS * SAMPLES) -> None:
        """The weights are right, each epoch trained every sample once, and nothing is left."""
        assert torch.equal(weights, expected)
        times = Counter(key for _, key in self.history)
        names = {name for _, name in times}
        assert times == {(epoch, name): 1 for epoch in range(EPOCHS) for name in names}
        assert len(names) == SAMPLES
        while any([producer.once() for producer in self.producers]):  # nobody has anything more to do
            pass
        controller = self.producers[0].controller
        counts = controller.counts()
        if durable is not None:
            assert counts == {**dict.fromkeys(STATES, 0), State.DURABLE: durable}
        assert not any(counts[state] for state in STATES if state != State.DURABLE)
        controller.remove_orphans()
        assert controller.features.backend.stored() == []


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> torch.Tensor:
    """The weights of the undisturbed run."""
    world = World(tmp_path_factory.mktemp("undisturbed"))
    weights = world.train()
    world.check(weights, weights)
    assert len({json.dumps(key) for _, key in world.history}) == EPOCHS * SAMPLES
    return weights


@pytest.fixture
def dying(monkeypatch) -> list[World]:
    """These worlds may die between writing a file and renaming it. No host dies, so nothing need reach the disk."""
    worlds: list[World] = []
    replace = os.replace

    def rename(source, target, **options):
        for world in worlds:
            world.at("mid-checkpoint" if str(target).endswith(".ckpt") else "mid-put")
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return worlds


PRODUCER = ["after lease", "before put", "mid-put", "after put", "before commit", "after commit"]
TRAINER = [
    "delivered",
    "mid-step",
    "step done",
    "marked trained",
    "step recorded",
    "mid-checkpoint",
    "checkpoint complete",
    "marked durable",
    "discarded",
    "checkpoint durable",
    "rewound",
    "before forgetting",
    "forgotten",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """More seeds: `pytest -m faults --fault-seeds 50`."""
    if "fault_seed" in metafunc.fixturenames:
        many = 4 if "point" not in metafunc.fixturenames else 1
        metafunc.parametrize("fault_seed", range(many * metafunc.config.getoption("--fault-seeds")))


@pytest.mark.parametrize("point", PRODUCER + TRAINER)
def test_a_kill_at_any_point_changes_nothing(tmp_path, expected, dying, point, fault_seed):
    world = World(tmp_path, fault_seed, retain=("until_durable", "until_trained")[fault_seed % 2])
    dying.append(world)
    first = point in ("rewound", "before forgetting", "forgotten")  # happens once a start
    few = "checkpoint" in point or point == "marked durable"
    world.countdown = {point: 0 if first else world.random.randrange(3 if few else 6)}
    weights = world.train()
    assert world.producers[0].controller.remove_orphans() == 0  # the next checkpoint removed them
    world.check(weights, expected)
    assert world.deaths == 1


def test_kills_upon_kills_change_nothing(tmp_path, expected, dying, fault_seed):
    room, retain = (5, 8, 100)[fault_seed % 3], ("until_durable", "until_trained")[fault_seed % 2]
    world = World(tmp_path, fault_seed, room, retain)
    dying.append(world)
    points = world.random.sample(PRODUCER + TRAINER, 6)
    world.countdown = {point: world.random.randrange(8) for point in points}
    world.check(world.train(), expected)
    assert world.deaths


def stored_files(world: World) -> list[Path]:
    return sorted(Path(world.where["store"]).rglob("*.safetensors"))


def cut_off(path: Path) -> None:
    rewrite(path, path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1 - len(content) // 4] ^= 16
    rewrite(path, bytes(content))


def rewrite(path: Path, content: bytes) -> None:
    """As another file: who has the old one mapped keeps it."""
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink], ids=["cut off", "bit flipped", "deleted"])
def test_damaged_features_are_produced_again(tmp_path, expected, dying, damage, seed):
    world = World(tmp_path, seed)
    damaged: list[Path] = []

    def strike() -> None:
        files = stored_files(world)
        if files and len(damaged) < 4 and world.random.random() < 0.3:
            damaged.append(world.random.choice(files))
            damage(damaged[-1])

    world.events.append(strike)
    world.check(world.train(), expected)
    assert damaged


@pytest.mark.parametrize("seed", range(2))
def test_a_full_disk_stops_producers_in_good_order(tmp_path, expected, dying, monkeypatch, seed):
    from specforge.runtime.data_plane import shared_dir

    world, write = World(tmp_path, seed), shared_dir.write_flat

    def write_flat(path, tensors, *, sync):
        if world.random.random() < 0.2:
            path.write_bytes(b"what still fitted")
            raise OSError(28, "No space left on device")
        write(path, tensors, sync=sync)

    monkeypatch.setattr(shared_dir, "write_flat", write_flat)
    world.check(world.train(), expected)
    assert world.ended
    assert all("No space left on device" in line for line in world.ended)


def test_a_slow_disk_only_costs_time(tmp_path, expected, dying, monkeypatch, fault_seed):
    """Writes, renames, syncs and reads take longer than leases last; meanwhile others take the prompts over."""
    from specforge.runtime.data_plane import shared_dir

    world = World(tmp_path, fault_seed, max_tries=99)  # nobody renews leases here, as producers do
    write, read = shared_dir.write_flat, shared_dir.SharedDirBackend.read
    stalls: list[str] = []
    others: list[Producer] = []

    def stall(where: str) -> None:
        if not others and world.random.random() < 0.15:
            stalls.append(where)
            world.now += world.random.choice([3.0, 15.0])
            others.append(world.producers[1 - world.at_work])
            if world.random.random() < 0.3:  # the one that stalls, started again
                others[0] = world.start_producer(world.producers[world.at_work].owner)
            others[0].once()
            others.clear()

    def write_flat(path, tensors, *, sync):
        stall("before a write")
        write(path, tensors, sync=sync)
        stall("before a rename")

    def slow_read(self, key, uri):
        stall("a read")
        return read(self, key, uri)

    monkeypatch.setattr(shared_dir, "write_flat", write_flat)
    monkeypatch.setattr(shared_dir.SharedDirBackend, "read", slow_read)
    monkeypatch.setattr(os, "fsync", lambda file: stall("a sync"))
    world.check(world.train(), expected)
    assert stalls
    assert not world.ended


def test_a_put_that_takes_longer_than_a_lease_keeps_it(tmp_path):
    world = World(tmp_path)
    provenance = Provenance("tiny", "f" * 8, "t", CapturePolicy(()), "float32")
    slow, other = (control(world.where, lease_seconds=0.3) for _ in "ab")
    slow.ingest({sample_id(prompt(0), provenance): prompt(0)}, provenance=provenance)
    renewed, stop, found = threading.Semaphore(0), threading.Event(), []
    renew, write = slow.renew, slow.features.backend.write

    def renewing(owner, leased):
        held = renew(owner, leased)
        renewed.release()
        return held

    def slow_write(key, tensors):
        uri = write(key, tensors)
        for _ in range(5):  # half a second
            renewed.acquire(timeout=60)
        found.extend([other.lease("other", 1), other.unfinished()])
        stop.set()
        return uri

    slow.renew, slow.features.backend.write = renewing, slow_write
    Producer(slow, lambda dtype: Engine(), "f" * 8, "slow").run(stop)
    assert found == [[], 1]
    assert slow.counts()[State.COMMITTED] == 1


def test_producers_that_die_with_bytes_in_the_store_never_exceed_its_limit(tmp_path, expected, dying, fault_seed):
    """Between put and commit, again and again, started again under their own names and under others."""
    limit = 900  # six samples of the longest
    world = World(tmp_path, fault_seed, 100, ("until_durable", "until_trained")[fault_seed % 2], limit, 99)
    dying.append(world)
    peaks: list[int] = []
    points = ["mid-put", "after put", "before commit"]

    def measure_and_die(point: str) -> None:
        peaks.append(stored_bytes(Path(world.where["store"])))
        if point in points and len(peaks) < 60:
            world.countdown[point] = world.random.randrange(3)
        world.die(point)

    world.strike = measure_and_die
    world.countdown = {point: world.random.randrange(3) for point in points}
    world.countdown |= {point: world.random.randrange(6) for point in world.random.sample(TRAINER, 2)}
    world.events.append(lambda: peaks.append(stored_bytes(Path(world.where["store"]))))
    world.check(world.train(), expected)
    assert world.deaths > 10
    assert 0.6 * limit < max(peaks) <= limit


@pytest.mark.parametrize("seed", range(3))
def test_the_same_producer_started_twice(tmp_path, expected, dying, seed):
    """Under one name, they give each other's prompts back and produce some twice."""
    world = World(tmp_path, seed)
    started: list[str] = []

    def start_again() -> None:
        if len(started) < 5 and world.random.random() < 0.3:
            started.append("p0")
            world.producers[world.random.randrange(2)] = world.start_producer("p0")
            leased = world.producers[0].controller.lease("p0", 2)  # one that hangs with prompts in hand
            world.now += world.random.choice([0.0, 20.0])
            assert len(leased) <= 2

    world.events.append(start_again)
    world.check(world.train(), expected)
    assert started


@pytest.mark.parametrize("seed", range(3))
def test_duplicate_and_late_commits(tmp_path, expected, dying, seed):
    """A producer that was taken for dead puts and commits after all, each sample once more."""
    world = World(tmp_path, seed)
    late: list[str] = []

    def again() -> None:
        waiting = world.producers[0].controller.metadata.find(
            (State.COMMITTED, State.DELIVERED, State.TRAINED), text="ref"
        )
        if waiting and world.random.random() < 0.5:
            row = world.random.choice(waiting)
            ref = load_ref(row.text)
            if not world.producers[0].controller.features.holds(ref):
                return
            twin = world.start_producer("twin").controller  # with a store of its own
            twin.features.adopt([ref])
            copies = {name: x.clone() for name, x in twin.features.get(ref).items()}
            twin.features.disown([ref])
            copy = twin.features.put(
                ref.sample_id, copies, num_supervised=ref.num_supervised, source="", provenance=ref.provenance
            )
            assert twin.commit([(row.key, copy)]) == [False]
            late.append(row.key)

    world.events.append(again)
    world.check(world.train(), expected)
    assert late


@pytest.mark.parametrize("jump", [1e6, -1e6, 11.0])
def test_clocks_jump(tmp_path, expected, dying, jump):
    world = World(tmp_path, 1)
    world.countdown = {"after lease": 2}
    jumps = iter([jump, 0.0, -jump, 20.0, 1e7])

    def step() -> None:
        world.now += next(jumps, 0.0)

    world.events.append(step)
    world.check(world.train(), expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_metadata_store_that_is_emptied_is_refused_and_loses_nothing(tmp_path, expected, dying, seed):
    world = World(tmp_path, seed)
    emptied: list[int] = []

    def empty() -> None:
        controller = world.producers[0].controller
        if not emptied and len(world.history) > 8 + seed:
            emptied.append(len(world.history))
            controller.metadata.remove([row.key for row in controller.metadata.find(STATES)])

    world.events.append(empty)
    with pytest.raises(UserError, match="resume with --ckpt_path last"):
        world.train()
    assert emptied
    world.check(world.train(), expected, durable=None)


def test_prompts_that_no_target_can_do_are_named_and_left_out_by_policy(tmp_path, dying):
    world = World(tmp_path)
    bad = prompt(3)

    class Broken(Engine):
        def capture(self, input_ids, policy):
            (features,) = super().capture(input_ids, policy)
            if tuple(input_ids[0]) == bad.input_ids:
                features["last_hidden_states"][0, 0] = float("nan")
            return [features]

    world.engine = Broken()
    with pytest.raises(UserError, match=r"last_hidden_states holds NaN or infinity \(from line 3\)"):
        world.train()
    (letter,) = world.producers[0].controller.given_up()
    assert letter.tries == 5
    world.bad_samples = "skip"
    world.train()
    names = {name for _, (_, name) in world.history}
    assert len(names) == SAMPLES - 1
    assert letter.key.rpartition("@")[0] not in names
