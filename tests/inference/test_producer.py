"""A producer's leases, failures and endings."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from specforge.contracts import ANY_ENGINE, CapturePolicy, PromptTask, Provenance
from specforge.errors import UserError
from specforge.inference.producer import Producer
from specforge.inference.rollout_worker import sample_id
from specforge.inference.target_engine.base import TargetEngine, UnavailableError
from specforge.runtime.control_plane.controller import DataFlowController, load_ref
from specforge.runtime.control_plane.metadata import STATES, State
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.store import FeatureStore, StoreFullError
from tests.runtime.control_plane.memory import MemoryMetadataStore

PROVENANCE = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((), last_hidden_states=True), "float32")
TASKS = {
    sample_id(task, PROVENANCE): task
    for task in (PromptTask(f"t{i}", tuple(range(i + 2)), (0, *[1] * (i + 1)), f"line {i}") for i in range(4))
}


class Engine(TargetEngine):
    """Counts its passes; ``action`` may go wrong."""

    def __init__(self, action=lambda ids: None) -> None:
        self.action, self.passes = action, []

    def check(self, policy) -> None:
        pass

    def capture(self, input_ids, policy):
        self.passes.append(len(input_ids))
        self.action(input_ids)
        return [{"last_hidden_states": torch.tensor(ids, dtype=torch.float32)[:, None]} for ids in input_ids]


def made(engine: Engine, max_bytes: int | None = None, lease_seconds: float = 60.0, **options) -> Producer:
    features = FeatureStore(MemoryBackend(), max_bytes=max_bytes)
    control = DataFlowController(MemoryMetadataStore(), features, lease_seconds=lease_seconds, max_tries=2)
    control.ingest(TASKS, 0, PROVENANCE)
    return Producer(control, lambda dtype: engine, "f" * 8, "w", **options)


def counts(producer: Producer, **expected: int) -> None:
    assert producer.controller.counts() == {**dict.fromkeys(STATES, 0), **expected}


def test_each_prompt_by_itself_or_several_in_a_pass():
    for tokens, passes in ((1, [1, 1, 1, 1]), (100, [4])):
        engine = Engine()
        producer = made(engine, batch_tokens=tokens)
        assert producer.once()
        assert not producer.once()
        assert engine.passes == passes
        counts(producer, **{State.COMMITTED: 4})
        assert producer.controller.features.stat().samples == 0  # they are the trainer's now


def test_no_more_prompts_in_hand_than_allowed():
    producer = made(Engine(), max_prompts=3)
    producer.once()
    counts(producer, **{State.COMMITTED: 3, State.QUEUED: 1})


def test_two_epochs_of_a_sample_are_produced_once():
    engine = Engine()
    producer = made(engine)
    producer.controller.ingest(TASKS, 1, PROVENANCE)
    while producer.once():
        pass
    counts(producer, **{State.COMMITTED: 8})
    assert len(engine.passes) == 4


def test_leases_are_renewed_while_the_target_runs():
    """The target takes longer than a lease; whoever looks for expired ones finds none."""
    found: list[int] = []

    def slow(ids) -> None:
        if not found:
            threading.Event().wait(0.5)  # five leases long
            found.append(len(others.lease("thief", 9)))

    producer = made(Engine(slow), lease_seconds=0.1)
    others = DataFlowController(producer.controller.metadata, producer.controller.features, lease_seconds=0.1)
    producer.run(threading.Event(), idle_seconds=0.1)
    assert found == [0]
    counts(producer, **{State.COMMITTED: 4})


def test_a_stopped_producer_gives_back_what_it_has_not_begun():
    stop = threading.Event()
    producer = made(Engine(lambda ids: stop.set()))
    producer.run(stop)
    counts(producer, **{State.COMMITTED: 1, State.QUEUED: 3})
    assert all(row.tries == 0 for row in producer.controller.metadata.find((State.QUEUED,)))


def test_a_prompt_that_the_target_fails_on_is_given_up_and_the_others_go_on():
    def fail(ids) -> None:
        if len(ids[0]) == 3:
            raise RuntimeError("out of memory\nand more lines")

    producer = made(Engine(fail))
    while producer.once():
        pass
    counts(producer, **{State.COMMITTED: 3, State.DEAD: 1})
    assert producer.controller.given_up()[0].reason == "the target failed: out of memory"


def test_a_failure_does_not_touch_what_the_passes_before_have_made():
    def fail(ids) -> None:
        if len(engine.passes) == 3:
            raise RuntimeError("out of memory")

    engine = Engine(fail)
    producer = made(engine)
    producer.once()
    counts(producer, **{State.COMMITTED: 3, State.QUEUED: 1})
    (again,) = producer.controller.metadata.find((State.QUEUED,))
    assert (len(engine.passes), again.tries) == (4, 1)


class SlowBackend(MemoryBackend):
    """Takes its time: what it was given is stored when ``done`` says so, or not at all."""

    def __init__(self, done) -> None:
        super().__init__()
        self.done = done

    def flush(self) -> None:
        self.done()


def test_a_pass_is_stored_while_the_next_one_runs():
    """The first pass is not stored before the second one has begun."""
    begun = threading.Event()
    engine = Engine(lambda ids: len(engine.passes) == 2 and begun.set())
    producer = made(engine)
    producer.controller.features.backend = SlowBackend(lambda: begun.wait(60) or pytest.fail("nobody began"))
    producer.once()
    counts(producer, **{State.COMMITTED: 4})


def test_a_sample_that_is_being_stored_is_waited_for_when_another_epoch_wants_it():
    """The second epoch's prompts are leased while the last sample of the first is still on its way."""
    producer = made(Engine(), max_prompts=4)
    producer.controller.ingest(TASKS, 1, PROVENANCE)
    producer.controller.features.backend = SlowBackend(lambda: threading.Event().wait(0.05))
    producer.run(threading.Event(), idle_seconds=0.1)
    counts(producer, **{State.COMMITTED: 8})


def test_what_did_not_fit_is_known_at_the_flush_and_produced_again():
    flushed: list[int] = []

    def done() -> None:
        flushed.append(producer.controller.counts()[State.COMMITTED])
        if len(flushed) == 2:
            raise StoreFullError("no room")

    engine = Engine()
    producer = made(engine)
    producer.controller.features.backend = SlowBackend(done)
    producer.run(threading.Event(), idle_seconds=0.1)
    counts(producer, **{State.COMMITTED: 4})
    assert flushed[:2] == [0, 1]
    assert len(engine.passes) == 3 + 3
    assert len(producer.controller.features.backend.stored()) == 4


def test_a_bad_sample_costs_the_others_of_its_pass_nothing():
    class Failing(Engine):
        def capture(self, input_ids, policy):
            features = super().capture(input_ids, policy)
            if len(self.passes) == 1:
                features[2]["last_hidden_states"][0] = float("nan")
            return features

    engine = Failing()
    producer = made(engine, batch_tokens=100)
    producer.once()
    counts(producer, **{State.COMMITTED: 3, State.QUEUED: 1})
    (again,) = producer.controller.metadata.find((State.QUEUED,))
    assert "holds NaN" in again.reason
    producer.once()
    counts(producer, **{State.COMMITTED: 4})
    assert engine.passes == [4, 1]
    features = producer.controller.features
    for row in producer.controller.metadata.find((State.COMMITTED,), text="ref"):
        assert features.holds(load_ref(row.text))
    assert len(features.backend.stored()) == 4


def test_a_full_store_is_waited_for():
    """What does not fit is given back untried, and produced when the trainer has taken something away."""
    producer = made(Engine(), max_bytes=60)
    features, disown = producer.controller.features, producer.controller.features.disown
    held, full = [], threading.Event()
    features.disown = held.extend  # nobody takes anything away
    release = producer.controller.release

    def released(owner: str) -> int:
        count = release(owner)
        if count:
            full.set()
        return count

    producer.controller.release = released
    stop = threading.Event()
    thread = threading.Thread(target=producer.run, args=[stop, 1.0])
    thread.start()
    assert full.wait(10)
    assert 0 < len(held) < 4
    features.disown = disown
    disown(held)
    thread.join()
    counts(producer, **{State.COMMITTED: 4})


def test_a_store_that_stays_full_is_reported_once_and_costs_no_try(caplog):
    class Full(Engine):
        refused = 0

        def capture(self, input_ids, policy):
            if self.refused < 3:
                self.refused += 1
                raise StoreFullError("server http://s: no space left on device")
            return super().capture(input_ids, policy)

    producer = made(Full())
    producer.run(threading.Event(), idle_seconds=0.1)
    counts(producer, **{State.COMMITTED: 4})
    assert [row.tries for row in producer.controller.metadata.find((State.COMMITTED,))] == [1] * 4
    assert [x.getMessage() for x in caplog.records if "full" in x.getMessage()] == [
        "the store is full (server http://s: no space left on device); waiting for space"
    ]


def test_another_target_is_refused_and_nothing_stays_leased():
    producer = made(Engine())
    producer.fingerprint = "g" * 8
    with pytest.raises(UserError, match="the same target"):
        producer.run(threading.Event())
    counts(producer, **{State.QUEUED: 4})


NO_LAYER = replace(PROVENANCE, capture=CapturePolicy((99,)))


@pytest.mark.parametrize(
    ("task", "provenance", "reason"),
    [
        (PromptTask("t", (), ()), PROVENANCE, "it has no tokens"),
        (PromptTask("t", (3, 99), (0, 1)), PROVENANCE, "token 99 is not in the target's vocabulary of 50"),
        (PromptTask("t", (-1, 3), (0, 1)), PROVENANCE, "token -1 is not in the target's vocabulary of 50"),
        (PromptTask("t", (1, 2), (0, 1)), None, "it does not specify what to capture"),
        (PromptTask("t", (1, 2), (0, 1)), NO_LAYER, "layer 99: tiny has 8 layers"),
    ],
)
def test_a_prompt_that_no_target_can_read_is_given_up_at_once_and_the_others_go_on(task, provenance, reason):
    class Layered(Engine):
        def check(self, policy) -> None:
            if policy.layer_ids:
                raise UserError("layer 99: tiny has 8 layers")

    producer = made(Layered(), vocab_size=50, batch_tokens=100)
    producer.controller.ingest({"bad": task}, 0, provenance)
    while producer.once():
        pass
    counts(producer, **{State.COMMITTED: 4, State.DEAD: 1})
    (letter,) = producer.controller.given_up()
    assert (letter.key, letter.tries, letter.reason) == ("bad@0", 1, reason)


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError, AssertionError, MemoryError, KeyError])
def test_whatever_the_target_raises_of_one_prompt_costs_only_that_one(error):
    """Though they were in one pass; the others of it are made one by one."""

    def fail(ids) -> None:
        if any(len(x) == 3 for x in ids):
            raise error("\x1b[31mred\nand more")

    producer = made(Engine(fail), batch_tokens=100)
    while producer.once():
        pass
    counts(producer, **{State.COMMITTED: 3, State.DEAD: 1})
    (letter,) = producer.controller.given_up()
    assert letter.tries == 2
    assert letter.reason.startswith("the target failed: ")
    assert letter.reason.isprintable()


def test_a_target_that_can_do_nothing_any_more_ends_the_producer_after_the_prompt_is_named():
    """As an accelerator after an assertion; the prompt has one try less, so that it cannot end every producer."""
    broken: list[str] = []

    class Broken(Engine):
        def check(self, policy) -> None:
            if broken:
                raise RuntimeError("device-side assert")

    producer = made(Broken(lambda ids: broken.append("x") or (_ for _ in ()).throw(RuntimeError("assert"))))
    with pytest.raises(UserError, match=r"the target failed: assert; the target no longer works .device-side assert."):
        producer.run(threading.Event())
    counts(producer, **{State.QUEUED: 4})
    assert [row.tries for row in producer.controller.metadata.find((State.QUEUED,))] == [1, 0, 0, 0]


def test_a_server_that_is_gone_ends_the_producer_and_costs_no_prompt_a_try():
    """Else an outage would give up every prompt; another producer, or this one after a restart, goes on with them."""

    def gone(ids) -> None:
        raise UnavailableError("server http://127.0.0.1:1: no answer for 300 s")

    class Gone(Engine):
        def check(self, policy) -> None:
            gone(policy)

    for engine in (Engine(gone), Gone()):
        producer = made(engine)
        with pytest.raises(UnavailableError, match="no answer for 300 s"):
            producer.run(threading.Event())
        counts(producer, **{State.QUEUED: 4})
        assert {row.tries for row in producer.controller.metadata.find((State.QUEUED,))} == {0}


class Described(Engine):
    """An engine of another kind than transformers."""

    description = "vllm 9.9"


def of_two_engines(wanted: Provenance) -> tuple[Producer, Producer]:
    first = made(Engine(), max_prompts=2)
    first.controller.metadata.remove([f"{name}@0" for name in TASKS])
    first.controller.ingest({f"{name}-run": task for name, task in TASKS.items()}, 0, wanted)
    first.controller.ingest({f"{name}-other": task for name, task in TASKS.items()}, 0, wanted)
    return first, Producer(first.controller, lambda dtype: Described(), "f" * 8, "w2", max_prompts=2)


def test_two_producers_with_different_engines_cannot_both_commit():
    """The first decides it for its run; those of another run in the same stores may be of another engine."""
    first, second = of_two_engines(PROVENANCE)
    assert first.once()
    message = "the features of this run are computed by transformers, not vllm 9.9, which differ in their last bits"
    with pytest.raises(UserError, match=message):
        second.run(threading.Event())
    counts(first, **{State.COMMITTED: 2, State.QUEUED: 6})
    assert first.once()
    assert second.once()
    found = first.controller.references((State.COMMITTED,))
    assert {(ref.sample_id.partition("-")[2], ref.provenance.engine) for ref in found} == {
        ("run", ""),
        ("other", "vllm 9.9"),
    }
    with pytest.raises(UserError, match=r"are computed by vllm 9\.9, not transformers"):
        first.run(threading.Event())


def test_engines_are_mixed_if_the_trainer_asks_for_it():
    first, second = of_two_engines(replace(PROVENANCE, engine=ANY_ENGINE))
    assert first.once()
    assert second.once()
    engines = [ref.provenance.engine for ref in first.controller.references((State.COMMITTED,))]
    assert sorted(engines) == ["", "", "vllm 9.9", "vllm 9.9"]


def test_samples_of_other_features_of_one_prompt_are_told_apart():
    """Two runs, one after the other, asked for them; a producer holds prompts of both."""
    producer = made(Engine(), max_prompts=99)
    half = replace(PROVENANCE, dtype="float16")
    names = {f"{name}-half": task for name, task in TASKS.items()}
    producer.controller.ingest(names, 0, half)
    producer.once()
    counts(producer, **{State.COMMITTED: 8})
    kinds = {ref.sample_id: ref.provenance for ref in producer.controller.references((State.COMMITTED,))}
    assert kinds == dict.fromkeys(TASKS, PROVENANCE) | dict.fromkeys(names, half)


def test_what_was_forgotten_meanwhile_is_neither_committed_nor_failed():
    """The trainer started anew; of a sample that one of two epochs still wants, that one gets it."""

    def forget(ids) -> None:
        name = names.pop(0)
        producer.controller.metadata.remove([f"{name}@0"])
        if len(names) == 2:
            raise RuntimeError("late")

    names = list(TASKS)
    producer = made(Engine(forget), max_prompts=99)
    producer.controller.ingest({names[0]: TASKS[names[0]]}, 1, PROVENANCE)
    producer.once()
    counts(producer, **{State.COMMITTED: 1})
    assert len(producer.controller.features.backend.stored()) == 1
