"""Splits conversations into training and held-out data without overlap."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash

from specforge.contracts import PromptTask
from specforge.data.conversations import Conversation, DataRecord
from specforge.errors import UserError


@dataclass(frozen=True)
class Member:
    """The properties of a conversation that determine its split."""

    split: str | None  # the split that the record names, if any
    samples: tuple[str, ...]  # ids of its samples
    prompts: frozenset[bytes]  # hashes of its prompts, including those with answers that are not trained on

    @classmethod
    def of(cls, record: DataRecord, tasks: Sequence[PromptTask], special_ids: Collection[int] = ()) -> Member:
        """The member for a record and its samples."""
        asked = {prompt for task in tasks for prompt in prompts_of(task, special_ids)}
        if isinstance(record.content, Conversation) and record.content.first_answer is not None:
            asked.add(record.content.digest(record.content.first_answer).encode())
        return cls(record.split, tuple(task.task_id for task in tasks), frozenset(asked))


def prompts_of(task: PromptTask, special_ids: Collection[int] = ()) -> Iterator[bytes]:
    """Hash each prompt of a sample (all tokens before a supervised run), unless it has only special tokens."""
    digest, start, has_text = xxhash.xxh3_128(), 0, False
    for stop in (i + 1 for i, (a, b) in enumerate(pairwise(task.loss_mask)) if b and not a):
        piece = task.input_ids[start:stop]
        digest.update(np.asarray(piece, dtype=np.int64).tobytes())
        has_text = has_text or any(i not in special_ids for i in piece)
        start = stop
        if has_text:
            yield digest.digest()


def assign(members: Sequence[Member], holdout: int = 0, seed: int = 0) -> list[str | None]:
    """Assign each conversation to ``train``, ``heldout``, or None (left out).

    Conversations that share a sample or a prompt form a group. If one of them names ``heldout``, the others of the
    group that do not are left out; if one names ``train``, the group is not drawn from.

    Args:
        members: the conversations.
        holdout: number of samples to hold out from conversations that name no split; a group is drawn as a whole, so
            there may be more.
        seed: random seed for choosing held-out conversations.

    Raises:
        UserError: there are fewer conversations, or none would be left for training.
    """
    splits = [member.split for member in members]
    free = []
    for group in _groups([{*member.samples, *member.prompts} for member in members]):
        named = {splits[i] for i in group}
        if named == {None}:
            free.append(group)
            continue
        for i in group:
            if "heldout" not in named:
                splits[i] = "train"
            elif splits[i] != "heldout":
                splits[i] = None
    sizes = [len({members[i].samples for i in group}) for group in free]
    if holdout > sum(sizes):
        raise UserError(f"holdout is {holdout}, but only {sum(sizes)} conversations name no split")
    held = 0
    for drawn in np.random.default_rng(seed).permutation(len(free)).tolist():
        for i in free[drawn]:
            splits[i] = "heldout" if held < holdout else "train"
        held += sizes[drawn]
    if holdout and "train" not in splits:
        raise UserError(
            f"holdout is {holdout}, which leaves nothing to train on (there are {sum(sizes)} conversations, and those "
            "that share a prompt stay together)"
        )
    return splits


def _groups(keys: Sequence[Collection[Hashable]]) -> list[list[int]]:
    """Group indices that share a key, directly or through others; groups and members keep the given order."""
    parents = list(range(len(keys)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    owners: dict[Hashable, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            parents[root(i)] = root(owners.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(keys)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
