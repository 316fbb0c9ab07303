"""`specforge doctor`: packages, hardware, and the recipes that this machine can run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specforge.cli.recipes import GPUs, Recipe, read_head, recipes
from specforge.packages import EXTRAS, VERSION, install_hint, installed
from specforge.system import cores

_PACKAGES = ("torch", "lightning", "transformers", "safetensors", "jsonargparse", "torchmetrics")


@dataclass(frozen=True)
class Machine:
    """Hardware that recipes need, in GB of 10^9 bytes."""

    ram_gb: float
    disk_gb: float
    gpus_gb: tuple[float, ...] = ()

    @classmethod
    def detect(cls) -> Machine:
        """This machine; its free disk space is that of the current folder."""
        gpus: tuple[float, ...] = ()
        if find_spec("torch"):
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(torch.cuda.get_device_properties(i).total_memory / 1e9 for i in range(count))
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(ram / 1e9, shutil.disk_usage(".").free / 1e9, gpus)

    def has(self, need: GPUs) -> bool:
        """Whether enough GPUs have enough memory."""
        return sum(gpu >= need.gpu_gb for gpu in self.gpus_gb) >= need.gpus


def main() -> int:
    """Show what this machine can run; the exit status is 1 if a required package is missing."""
    for title, text in findings():
        print(f"{title:<12} {text}".rstrip())
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)} (reinstall SpecForge)")
    return 1 if missing else 0


def findings() -> Iterator[tuple[str, str]]:
    """Titles and texts, from top to bottom."""
    yield "specforge", f"{VERSION} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "packages", ", ".join(installed(name) or f"{name} missing" for name in _PACKAGES)
    for name, extra in EXTRAS.items():
        found = installed(extra.module)
        yield name, f"{found or 'not installed'} ({extra.purpose}){'' if found else ': ' + install_hint(name)}"
    yield "cpu", _describe_cpu()
    machine = Machine.detect()
    yield "memory", f"{machine.ram_gb:.0f} GB"
    yield "disk", f"{machine.disk_gb:.0f} GB free in this folder"
    yield from _describe_gpus()
    yield from describe_recipes(machine)


def _describe_cpu() -> str:
    if find_spec("torch") is None:
        return f"{cores()} cores"
    import torch

    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = next((name for name in ("amx_bf16", "avx512_bf16") if has.get(name)), None)
    advice = "use precision bf16-mixed" if bf16 else "precision bf16-mixed gains nothing here"
    return (
        f"{cores()} cores, {has.get('cpu_name') or platform.machine()}; bf16 instructions: {bf16 or 'none'} ({advice})"
    )


def _describe_gpus() -> Iterator[tuple[str, str]]:
    if find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield "gpu", f"{device.name}, {device.total_memory / 1e9:.0f} GB"
    elif torch.backends.mps.is_available():
        yield "gpu", "Apple (trainer.accelerator: mps)"
    else:
        yield "gpu", "none; training runs on the CPU"


def describe_recipes(machine: Machine) -> Iterator[tuple[str, str]]:
    """Which recipes a machine can run, and what it lacks for each of the others."""
    heads = {name: head for name, path in recipes().items() if (head := read_head(path))}
    lacking = {name: shortfalls(head, machine) for name, head in heads.items()}
    yield "recipes", f"{sum(not lacks for lacks in lacking.values())} of {len(heads)} run here"
    for name, lacks in lacking.items():
        yield f"  {name:<34}", f"needs {', '.join(lacks)}" if lacks else "runs here"


def shortfalls(recipe: Recipe, machine: Machine) -> list[str]:
    """What a machine lacks for a recipe; empty if the recipe can be run."""
    fit, capture, lacks = recipe.fit, recipe.capture, []
    if capture.gpus > 1:
        lacks.append(f"{_count(capture)} to capture (`specforge capture` uses one GPU)")
    elif not machine.has(capture) and machine.has(fit):
        lacks.append(f"{_count(capture)} to capture")
    if not machine.has(fit):
        one_gpu_each = capture.gpus == fit.gpus == 1
        lacks.insert(
            0, _count(max(fit, capture, key=lambda x: x.gpu_gb)) if one_gpu_each else f"{_count(fit)} to train"
        )
    if machine.ram_gb < recipe.ram_gb:
        lacks.append(f"{recipe.ram_gb:g} GB of memory")
    if machine.disk_gb < recipe.disk_gb:
        lacks.append(f"{recipe.disk_gb:g} GB of disk")
    return lacks


def _count(need: GPUs) -> str:
    return f"{need.gpus} GPU{'s' * (need.gpus > 1)} of {need.gpu_gb:g} GB"
