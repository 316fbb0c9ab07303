"""`specforge doctor`: what this machine can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("torch", "lightning", "transformers", "safetensors", "jsonargparse", "torchmetrics")
_EXTRAS = {
    "hub": ("datasets", "hub datasets"),
    "gguf": ("gguf", "targets in GGUF files, the quickstart's among them"),
    "sglang": ("sglang", "serving exported drafts"),
    "mooncake": ("mooncake", "features in other hosts' memory, over TCP or RDMA"),
    "redis": ("redis", "metadata for many hosts"),
    "ray": ("ray", "many producers and trainers"),
}


def main() -> int:
    """Show what this machine can run; the exit status is 1 if a required package is missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    for title, text in findings():
        print(f"{title:<12} {text}")
    if missing:
        print(f"missing: {', '.join(missing)} (pip install specforge)")
    return 1 if missing else 0


def findings() -> Iterator[tuple[str, str]]:
    """Titles and texts, top to bottom."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    for extra, (module, what) in _EXTRAS.items():
        state = _version(module) if find_spec(module) else f"not installed (pip install 'specforge[{extra}]')"
        yield extra, f"{state}: {what}"
    yield "cpu", _cpu()
    memory = _memory()
    yield "memory", f"{memory / 2**30:.1f} GiB"
    yield "disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    yield from _accelerators(memory)


def _version(package: str) -> str:
    builds = ("-non-cuda", "", "-cuda13")  # of one and the same package
    names = [f"mooncake-transfer-engine{x}" for x in builds] if package == "mooncake" else [package]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "?"


def _cpu() -> str:
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    bf16 = "AMX" if "amx_bf16" in flags else "AVX-512" if "avx512_bf16" in flags else "no"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    advice = "use precision bf16-mixed" if bf16 != "no" else "use precision 32-true: bf16 is emulated here"
    return f"{cores} cores, {name}; bf16 instructions: {bf16} ({advice})"


def _memory() -> int:
    if sys.platform.startswith(("linux", "darwin")):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def _accelerators(memory: int) -> Iterator[tuple[str, str]]:
    if find_spec("torch") is None:
        return
    import torch

    room = memory
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield "gpu", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        room = torch.cuda.get_device_properties(0).total_memory
    elif torch.backends.mps.is_available():
        yield "gpu", "Apple (trainer.accelerator: mps)"
    else:
        yield "gpu", "none: training runs on the CPU"
    yield "recipes", _fitting(room / 2**30, torch.cuda.is_available())


def _fitting(gib: float, gpu: bool) -> str:
    from specforge.cli.recipes import describe, recipes

    fits: list[str] = []
    large: list[str] = []
    for name, path in recipes().items():
        needs = [line for line in describe(path) if line.startswith("Needs ")]
        gpu_gib = next((float(w) for line in needs for w in line.split() if w.replace(".", "").isdigit()), 0.0)
        wants_gpu = any("GPU" in line for line in needs)
        (fits if gpu_gib <= gib and (gpu or not wants_gpu) else large).append(name)
    text = "can run " + ", ".join(fits)
    return text + (f"; too large for this machine: {', '.join(large)}" if large else "")
