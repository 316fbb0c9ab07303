"""`specforge status`: the state of a disaggregated run, and of the processes of a cluster."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from specforge.console import say
from specforge.errors import UserError
from specforge.files import read_json, write_file
from specforge.inference.target_engine.http import printable
from specforge.options import Seconds
from specforge.runtime.addresses import open_backend, open_metadata
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import STATES, State
from specforge.runtime.control_plane.streamed import bottleneck
from specforge.runtime.data_plane.store import FeatureStore

_STATE_NAMES = {State.DEAD: "given up"}  # where the stored name is not the user's term
_LATE = 30.0  # seconds without news after which `launch` is presumed dead


@dataclass(frozen=True)
class ClusterRun:
    """What `specforge launch` tells about a run, in a file in the run's folder.

    Attributes:
        name: name of the run in the cluster.
        store: address of the feature store.
        metadata: address of the metadata store.
        processes: what runs: name, node and state of each; empty once the run has ended.
        time: when it was written, in seconds since the epoch.
    """

    name: str
    store: str
    metadata: str
    processes: list[list[str]]
    time: float

    FILE = "cluster.json"

    def save(self, run: Path) -> None:
        """Write the file."""
        write_file(run / self.FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, run: Path) -> Self:
        """Read the file.

        Raises:
            UserError: it is damaged.
        """
        try:
            return cls(**read_json(run / cls.FILE))
        except TypeError as error:
            raise UserError(f"{run / cls.FILE}: is not what launch writes; start launch again") from error

    def describe(self, now: float) -> list[str]:
        """The processes, in lines."""
        if not self.processes:
            return [f"{self.name}: launch has ended"]
        since = max(0.0, now - self.time)
        late = f"has not been heard of for {since:.0f} s; if it has died, start it again with --ckpt_path last"
        return [
            f"{self.name}: launch {late if since > _LATE else 'is running'}",
            *(f"  {name}: {state}{f' on {node}' * bool(node)}" for name, node, state in self.processes),
        ]


def status(
    run: Path | None = None,
    store: str | None = None,
    metadata: str | None = None,
    seconds: Seconds = 2.0,
    revive: bool = False,
) -> None:
    """Show the state of a disaggregated run: samples by state, rates, bytes, given-up prompts and the bottleneck.

    Of a run that `specforge launch` started, also its processes.

    Args:
        run: the run's folder (trainer.default_root_dir), which knows the stores.
        store: the trainer's data.store, instead of the one that the run's folder names.
        metadata: the trainer's data.metadata, instead of the one that the run's folder names.
        seconds: how long to measure the rates.
        revive: queue the given-up prompts again.
    """
    named: dict[str, str] = {}
    if run is not None and (run / ClusterRun.FILE).exists():
        found = ClusterRun.load(run)
        named = {"store": found.store, "metadata": found.metadata}
        say("\n".join(found.describe(time.time())))
    elif run is not None:
        named = _named_in(run / "config.yaml")
    store = named.get("store") if store is None else store
    metadata = named.get("metadata") if metadata is None else metadata
    if store is None or metadata is None:
        raise UserError("status: name the run's folder, or its stores (--store and --metadata)")
    say("\n".join(describe_status(store, metadata, seconds, revive)))


def _named_in(path: Path) -> dict[str, str]:
    """The stores that a run's configuration names.

    Raises:
        UserError: there is none, or it is not that of a disaggregated run.
    """
    try:
        data: Any = yaml.safe_load(path.read_text())["data"]["init_args"]
        return {name: str(data[name]) for name in ("store", "metadata")}
    except OSError as error:
        raise UserError(
            f"{path.parent}: no run has begun there (no {path.name}); or give --store and --metadata"
        ) from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a run of DisaggregatedDataModule, which has a store and metadata") from error


def describe_status(store: str, metadata: str, seconds: float, revive: bool) -> list[str]:
    """Lines about a disaggregated run; see :func:`status`."""
    controller = DataFlowController(open_metadata(metadata), FeatureStore(open_backend(store)))
    before, since = controller.counts(), time.monotonic()
    time.sleep(seconds)  # the rates are measured over this time
    counts, elapsed = controller.counts(), time.monotonic() - since
    produced, trained = (
        (sum(counts[s] for s in states) - sum(before[s] for s in states)) / max(elapsed, 1e-9)
        for states in ((State.COMMITTED, State.DELIVERED, State.TRAINED, State.DURABLE), (State.TRAINED, State.DURABLE))
    )
    held = controller.references((State.COMMITTED, State.DELIVERED, State.TRAINED))
    held = list({ref.uri: ref for ref in held if controller.features.holds(ref)}.values())  # epochs may share them
    given_up = controller.given_up()
    lines = [
        "samples: " + ", ".join(f"{counts[state]:,} {_STATE_NAMES.get(state, state)}" for state in STATES),
        f"features: {sum(ref.nbytes for ref in held) / 1e6:,.1f} MB of {len(held):,} samples in the store",
        f"rates: {produced:.1f} samples/s produced, {trained:.1f} trained",
        bottleneck(counts, produced, controller.unfinished(), controller.stalled()),
        *(printable(f"given up: {x.key} after {x.tries} tries: {x.reason}", 2000) for x in given_up),
    ]
    if given_up and revive:
        controller.revive([prompt.key for prompt in given_up])
        lines.append(f"queued again: {len(given_up)} given-up prompts")
    controller.metadata.close()
    return lines
