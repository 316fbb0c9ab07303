"""Which conversations are held out, so that nothing of them is trained on."""

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
    """A conversation, as far as its split matters.

    Attributes:
        split: the one that its record names, if any.
        samples: ids of its samples.
        prompts: hashes of what the target is asked in it, whether the answer is learnt or not.
    """

    split: str | None
    samples: tuple[str, ...]
    prompts: frozenset[bytes]

    @classmethod
    def of(cls, record: DataRecord, tasks: Sequence[PromptTask], special_ids: Collection[int] = ()) -> Member:
        """A record and its samples."""
        asked = {prompt for task in tasks for prompt in prompts_of(task, special_ids)}
        if isinstance(record.content, Conversation) and record.content.first_answer is not None:
            asked.add(record.content.digest(record.content.first_answer).encode())
        return cls(record.split, tuple(task.task_id for task in tasks), frozenset(asked))


def prompts_of(task: PromptTask, special_ids: Collection[int] = ()) -> Iterator[bytes]:
    """A hash of each prompt in a sample: of the tokens before each run that is learnt.

    Args:
        task: the sample.
        special_ids: tokens that ask nothing; a prompt of nothing else is none.
    """
    digest, start, asks = xxhash.xxh3_128(), 0, False
    for stop in (i + 1 for i, (a, b) in enumerate(pairwise(task.loss_mask)) if b and not a):
        piece = task.input_ids[start:stop]
        digest.update(np.asarray(piece, dtype=np.int64).tobytes())
        asks = asks or any(i not in special_ids for i in piece)
        start = stop
        if asks:
            yield digest.digest()


def assign(members: Sequence[Member], holdout: int = 0, seed: int = 0) -> list[str | None]:
    """The split of each conversation: ``train``, ``heldout``, or None where it is left out.

    Conversations that share a sample or a prompt stay together. Where one of them names ``heldout``, those that do not
    are left out; where one names ``train``, none is drawn.

    Args:
        members: the conversations.
        holdout: how many to draw from those that name no split; a group is drawn whole, so there may be more.
        seed: of the draw.

    Raises:
        UserError: there are not so many, or none is left to train on.
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
    """Indices of what shares a key, directly or through others; groups and their members in the given order."""
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
