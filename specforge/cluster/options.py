"""The section `cluster` of a recipe for `specforge launch`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from specforge.inference.target_engine import Engine, HFTargetEngine
from specforge.options import NonNegativeInt, PositiveInt

BESIDE_TRAINERS = "beside_trainers"  # a placement
# Instead of data.store or data.metadata: `launch` chooses a folder, a file or, on a cluster, Redis.
MADE = "auto"


@dataclass(frozen=True)
class ProducerOptions:
    """The producers of a run.

    Args:
        count: number of producers; `specforge launch --scale N` changes it while the run goes on.
        max_count: up to so many are added while training waits for samples, and removed while they wait for training
            (default: count).
        gpus: GPUs of each; a vllm or sglang server with tensor parallelism needs as many as its size.
        cpus: CPU cores of each, also its number of threads.
        engine: what runs the target; as for `specforge produce`.
        max_prompts: maximum number of prompts that a producer leases at a time (default: 8, or 64 for a server).
        batch_tokens: maximum number of tokens of a forward pass; as for `specforge produce`.
    """

    count: PositiveInt = 1
    max_count: PositiveInt | None = None
    gpus: NonNegativeInt = 0
    cpus: PositiveInt = 1
    engine: Engine = HFTargetEngine
    max_prompts: PositiveInt | None = None
    batch_tokens: PositiveInt = 1


@dataclass(frozen=True)
class TrainerOptions:
    """The ranks that train.

    Args:
        count: number of ranks; replaces trainer.devices and trainer.num_nodes.
        gpus: GPUs of each rank, 0 or 1; replaces trainer.accelerator.
        cpus: CPU cores of each rank, also its number of threads.
    """

    count: PositiveInt = 1
    gpus: Literal[0, 1] = 0
    cpus: PositiveInt = 1


@dataclass(frozen=True)
class ClusterOptions:
    """Where a run's processes are started, and how many.

    Args:
        address: Ray cluster to join: ``auto`` for that of this machine, or ``host:port`` (default: start Ray on this
            machine).
        name: name of the run in the cluster (default: name of the run's folder).
        producers: The processes that run the target.
        trainers: The processes that train.
        placement: ``pack`` puts processes on as few nodes as possible, ``spread`` on as many as possible;
            ``beside_trainers`` spreads trainers, and puts producers on their nodes as long as there is room.
        store_bytes: memory that each node lends to a Mooncake store, which starts and ends with the run (default:
            features are in a folder).
        store_owners: number of processes of a node that lend its memory, equal parts each, into one of which every
            sample must fit; the death of one costs only what it held.
        metrics_port: port of `launch` for Prometheus metrics and health (default: none).
        max_failures: how often the trainers, and each producer, are started again before the run stops.
    """

    address: str | None = None
    name: str | None = None
    producers: ProducerOptions = field(default_factory=ProducerOptions)
    trainers: TrainerOptions = field(default_factory=TrainerOptions)
    placement: Literal["pack", "spread", "beside_trainers"] = "pack"
    store_bytes: PositiveInt | None = None
    store_owners: PositiveInt = 1
    metrics_port: PositiveInt | None = None
    max_failures: NonNegativeInt = 10
