"""SpecForge's version, and optional packages: the extras of pyproject.toml that its own code imports."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from typing import NamedTuple

VERSION = "0.1.0"


class Extra(NamedTuple):
    """An extra: the module that it installs, the requirement that provides the module, and its purpose.

    ``without_cuda`` provides the same module on machines without CUDA; its extra ends in ``-cpu``.
    """

    module: str
    requirement: str
    purpose: str
    without_cuda: str = ""


EXTRAS = {
    "hub": Extra("datasets", "datasets>=3.0", "hub datasets"),
    "gguf": Extra("gguf", "gguf>=0.10", "targets in GGUF files, such as the quickstart's"),
    "sglang": Extra("sglang", "sglang>=0.5.17", "serving exported drafts"),
    "mooncake": Extra(
        "mooncake",
        "mooncake-transfer-engine>=0.3.13",
        "features in other hosts' memory, by TCP or RDMA",
        without_cuda="mooncake-transfer-engine-non-cuda>=0.3.13",
    ),
    "ray": Extra("ray", "ray[default,train]>=2.50", "producers and trainers on a cluster (specforge launch)"),
    "redis": Extra("redis", "redis>=5.0", "metadata for several hosts"),
}


def install_hint(extra: str) -> str:
    """How to install an extra, for error messages."""
    _, requirement, _, without_cuda = EXTRAS[extra]
    hint = f"pip install '{requirement}' (in a checkout: pip install -e '.[{extra}]')"
    return hint + (f", or without CUDA '{without_cuda}' ('.[{extra}-cpu]')" if without_cuda else "")


def installed(module: str) -> str | None:
    """Name and version of the distribution that provides a module; None if it cannot be imported.

    Several distributions may provide one module: Mooncake has builds with and without CUDA.
    """
    if find_spec(module) is None:
        return None
    names = sorted(set(importlib.metadata.packages_distributions().get(module, [])))
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or f"{module} (version unknown)"
