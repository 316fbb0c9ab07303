"""What a run needs, and where its processes fit: computed before anything is started."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specforge.cluster.options import BESIDE_TRAINERS, ClusterOptions, ProducerOptions, TrainerOptions
from specforge.errors import UserError
from specforge.inference.sizing import Sizes, estimate
from specforge.inference.target_engine import engine_class, engine_config, engine_summary
from specforge.inference.target_files import TargetFiles


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        name: its address.
        cpus: number of CPU cores that Ray may use.
        gpus: number of GPUs that Ray may use.
    """

    name: str
    cpus: float
    gpus: float


@dataclass
class _Room:
    """What is left of a node, and what was put there."""

    node: Node
    cpus: float
    gpus: float
    processes: list[str] = field(default_factory=list)


def place(nodes: Sequence[Node], cluster: ClusterOptions) -> list[tuple[str, list[str]]]:
    """One way to put all processes of a run on nodes; Ray may choose another.

    Returns:
        Nodes, and the processes on each.

    Raises:
        UserError: they do not fit.
    """
    rooms = [_Room(node, node.cpus, node.gpus) for node in nodes]
    roles: dict[str, ProducerOptions | TrainerOptions] = {"producer": cluster.producers, "trainer": cluster.trainers}
    wanted = [(f"{role} {i}", each) for role, each in roles.items() for i in range(each.count)]
    if cluster.placement == BESIDE_TRAINERS:  # trainers first
        wanted.sort(key=lambda x: x[1] is not cluster.trainers)
    else:  # large ones first
        wanted.sort(key=lambda x: -x[1].gpus)
    for name, each in wanted:
        fits = [room for room in rooms if room.gpus >= each.gpus and room.cpus >= each.cpus]
        if not fits:
            raise UserError(_does_not_fit(nodes, cluster))
        room = _choose(fits, each, cluster)
        room.gpus, room.cpus = room.gpus - each.gpus, room.cpus - each.cpus
        room.processes.append(name)
    return [(room.node.name, sorted(room.processes)) for room in rooms if room.processes]


def _choose(fits: Sequence[_Room], each: ProducerOptions | TrainerOptions, cluster: ClusterOptions) -> _Room:
    """The node for a process, of those on which it fits."""
    if cluster.placement == BESIDE_TRAINERS and each is cluster.producers:
        trainers = [x.node.name for x in fits if any(name.startswith("trainer") for name in x.processes)]
        name = beside([Node(x.node.name, x.cpus, x.gpus) for x in fits], trainers, cluster.producers)
        return next((x for x in fits if x.node.name == name), fits[0])
    return fits[0] if cluster.placement == "pack" else min(fits, key=lambda x: len(x.processes))


def beside(free: Iterable[Node], trainers: Collection[str], each: ProducerOptions) -> str | None:
    """The node for a producer that is to run next to trainers: of theirs, the one with the most room.

    Args:
        free: what is free on each node.
        trainers: nodes with trainers.
        each: what a producer needs.

    Returns:
        Its name; None if no node with a trainer has room.
    """
    room = {node.name: capacity([node], each) for node in free if node.name in trainers}
    best = max(room, key=lambda name: room[name], default=None)
    return best if best is not None and room[best] > 0 else None


def left(
    nodes: Iterable[Node], trainers: Sequence[str], producers: Sequence[str], cluster: ClusterOptions
) -> list[Node]:
    """What nodes have left next to a run's processes.

    Args:
        nodes: all that each node has.
        trainers: the node of each trainer.
        producers: the node of each producer.
        cluster: what each process needs.
    """
    used: list[tuple[Sequence[str], ProducerOptions | TrainerOptions]]
    used = [(trainers, cluster.trainers), (producers, cluster.producers)]
    return [
        Node(
            node.name,
            node.cpus - sum(places.count(node.name) * each.cpus for places, each in used),
            node.gpus - sum(places.count(node.name) * each.gpus for places, each in used),
        )
        for node in nodes
    ]


def capacity(nodes: Iterable[Node], each: ProducerOptions | TrainerOptions) -> int:
    """How many processes of one kind fit on nodes on which this much is free."""
    return sum(int(min(x.cpus // each.cpus, x.gpus // each.gpus if each.gpus else x.cpus // each.cpus)) for x in nodes)


def give_up(nodes: Sequence[Node], producers: Mapping[int, str], cluster: ClusterOptions) -> list[int] | None:
    """The producers that have to stop so that all trainers fit: few of them, and rather the last ones.

    Args:
        nodes: what is free on each node.
        producers: the node of each producer that runs.
        cluster: what each process needs.

    Returns:
        Their numbers; None if the trainers would not fit without any producer.
    """

    def fits(stopped: Collection[int]) -> bool:
        there = freed(nodes, [producers[number] for number in stopped], cluster.producers)
        return capacity(there, cluster.trainers) >= cluster.trainers.count

    stopped: list[int] = []
    for number in sorted(producers, reverse=True):
        if not fits(stopped):
            stopped.append(number)
    if not fits(stopped):
        return None
    for number in sorted(stopped):  # its node may have no use for what it frees
        rest = [other for other in stopped if other != number]
        stopped = rest if fits(rest) else stopped
    return sorted(stopped)


def freed(nodes: Sequence[Node], places: Sequence[str], each: ProducerOptions) -> list[Node]:
    """What is free once a producer on each of these nodes has ended."""
    ended = [places.count(node.name) for node in nodes]
    return [
        Node(node.name, node.cpus + number * each.cpus, node.gpus + number * each.gpus)
        for node, number in zip(nodes, ended, strict=True)
    ]


def _does_not_fit(nodes: Sequence[Node], cluster: ClusterOptions) -> str:
    wanted = f"{_each('producer', cluster.producers)} and {_each('trainer', cluster.trainers)}"
    there = "; ".join(f"{node.name}: {amount(node.cpus, node.gpus)}" for node in nodes) or "no nodes"
    way = ", or use another placement" if cluster.placement == BESIDE_TRAINERS else ""
    return f"cluster: {wanted} do not fit into the cluster ({there}); ask for fewer, or add nodes{way}"


def _each(role: str, options: ProducerOptions | TrainerOptions) -> str:
    """Such as "2 trainers with 1 CPU each"."""
    most = options.count if isinstance(options, TrainerOptions) else options.max_count or options.count
    number = f"{options.count} to " * (most > options.count) + count(most, role)
    return f"{number} with {amount(options.cpus, options.gpus)}{' each' * (most > 1)}"


def count(number: int, noun: str) -> str:
    """Such as "2 trainers"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def named(producers: list[int]) -> str:
    """Such as "producers 1 and 2"."""
    *first, last = map(str, producers)
    return f"producers {', '.join(first)} and {last}" if first else f"producer {last}"


def amount(cpus: float, gpus: float) -> str:
    """Such as "1 CPU and 2 GPUs"."""
    return f"{cpus:g} CPU{'s' * (cpus != 1)}" + (f" and {gpus:g} GPU{'s' * (gpus != 1)}" if gpus else "")


def describe(
    cluster: ClusterOptions, nodes: Sequence[Node], recipe: Mapping[str, Any], where: Mapping[str, str]
) -> list[str]:
    """The plan of a run, in lines.

    Args:
        cluster: how many processes there are.
        nodes: the cluster's nodes.
        recipe: content of the recipe.
        where: what the store and the metadata are, in words.

    Raises:
        UserError: the processes do not fit, or the target or the model is rejected.
    """
    from lightning_modules.loading import captured_by, find_algorithm  # Lightning, which producers do not need

    placed = place(nodes, cluster)
    data, producers = recipe["data"]["init_args"], cluster.producers
    captured = captured_by(recipe)
    files = TargetFiles.find(captured.target)
    policy = find_algorithm(captured.algorithm).capture_policy(files, captured.layer_ids)
    sizes = estimate(
        files,
        policy,
        dtype=files.compute_dtype(data["dtype"]),
        encoding=data["encoding"],
        devices=int(engine_config(producers.engine)["init_args"].get("tensor_parallel") or 1),
    )
    layers = f"layers {list(policy.layer_ids)}" + " and the last hidden states" * policy.last_hidden_states
    return [
        f"{_each('producer', producers)}: {files.name} by {engine_summary(producers.engine)}, capturing {layers}",
        *(f"  {line}" for line in _producer_lines(cluster, sizes)),
        f"{_each('trainer', cluster.trainers)}: {captured.algorithm}",
        *(f"{name}: {text}" for name, text in where.items()),
        f"  at most {data['max_bytes'] / 1e9:,.2f} GB of features at once, about "
        f"{data['max_bytes'] // sizes.features:,} tokens",
        *(f"node {name}: {', '.join(processes)}" for name, processes in placed),
    ]


def _producer_lines(cluster: ClusterOptions, sizes: Sizes) -> list[str]:
    """Memory and bandwidth; the caches matter to servers only."""
    lines = sizes.lines(None)
    return lines if engine_class(cluster.producers.engine).independent else [lines[0], lines[-1]]
