"""Ranks as threads of this process, for code that needs no more of `torch.distributed` than a process group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(ranks: int, function: Callable[[dist.ProcessGroup], Any]) -> list[Any]:
    """What the function returns on each of some ranks, given their process group.

    Raises:
        Exception: that of the first rank that fails.
    """
    store = dist.HashStore()

    def run(rank: int) -> Any:
        group, kind = dist.ProcessGroup(store, rank, ranks), dist.ProcessGroup.BackendType.GLOO
        backend = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, ranks, timedelta(minutes=10))
        group._set_default_backend(kind)
        group._register_backend(torch.device("cpu"), kind, backend)
        return function(group)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))
