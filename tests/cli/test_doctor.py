"""What doctor says of this machine, and which recipes it says simulated machines can run."""

from __future__ import annotations

import re

import pytest

from specforge.cli.doctor import Machine, describe_recipes, findings, main, shortfalls
from specforge.cli.recipes import read_head, recipes

LAPTOP = Machine(ram_gb=16, disk_gb=100)
ONE_24 = Machine(ram_gb=64, disk_gb=1000, gpus_gb=(25.3,))
ONE_80 = Machine(ram_gb=256, disk_gb=2000, gpus_gb=(85.0,))
EIGHT_80 = Machine(ram_gb=2000, disk_gb=10000, gpus_gb=(85.0,) * 8)

SMALL = {name for name in recipes() if "smollm2" in name} | {"quickstart.yaml"}
HUGE = {"eagle3-deepseek-v3.yaml", "eagle3-kimi-k2.yaml", "mtp-deepseek-v3.yaml"}
ALL = {name for name in recipes() if "/" not in name}


def lacks(name: str, machine: Machine) -> list[str]:
    head = read_head(recipes()[name])
    assert head is not None
    return shortfalls(head, machine)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [(LAPTOP, SMALL), (ONE_24, SMALL), (ONE_80, ALL - HUGE), (EIGHT_80, ALL - HUGE)],
    ids=["laptop", "one 24 GB", "one 80 GB", "eight 80 GB"],
)
def test_the_recipes_that_a_machine_can_run(machine, expected):
    rows = dict(describe_recipes(machine))
    assert rows.pop("recipes") == f"{len(expected)} of {len(ALL)} run here"
    assert {title.strip() for title, text in rows.items() if text == "runs here"} == expected
    assert all(text == "runs here" or re.match(r"needs \d+ (GPU|GB)", text) for text in rows.values())


@pytest.mark.parametrize(
    ("name", "machine", "expected"),
    [
        ("eagle3-qwen3-8b.yaml", LAPTOP, ["1 GPU of 40 GB", "32 GB of memory", "350 GB of disk"]),
        ("dflash2-qwen3-8b.yaml", LAPTOP, ["1 GPU of 71 GB", "32 GB of memory", "510 GB of disk"]),
        ("eagle3-qwen3-8b.yaml", ONE_24, ["1 GPU of 40 GB to capture"]),
        ("dflash-qwen3-8b.yaml", ONE_24, ["1 GPU of 43 GB"]),
        ("mtp-mimo-7b.yaml", ONE_24, ["1 GPU of 40 GB to capture"]),
        ("dflash2-qwen3-8b.yaml", ONE_80, []),
        ("eagle3-kimi-k2.yaml", ONE_80, ["16 GPUs of 141 GB to capture (`specforge capture` uses one GPU)"]),
        (
            "mtp-deepseek-v3.yaml",
            EIGHT_80,
            ["8 GPUs of 192 GB to train", "8 GPUs of 141 GB to capture (`specforge capture` uses one GPU)"],
        ),
        ("quickstart.yaml", Machine(ram_gb=2, disk_gb=1), ["4 GB of memory", "2 GB of disk"]),
    ],
)
def test_what_a_machine_lacks(name, machine, expected):
    assert lacks(name, machine) == expected


def test_gpus_of_several_sizes_count_by_their_own_memory():
    mixed = Machine(ram_gb=256, disk_gb=2000, gpus_gb=(25.3, 85.0))
    assert lacks("eagle3-qwen3-8b.yaml", mixed) == []
    assert lacks("mtp-deepseek-v3.yaml", mixed)[0] == "8 GPUs of 192 GB to train"


def test_doctor_prints_packages_hardware_and_recipes(capsys):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split()[0] for line in lines]
    assert titles[:9] == ["specforge", "python", "packages", "hub", "gguf", "sglang", "mooncake", "ray", "redis"]
    assert re.search(r"torch \d", lines[2])
    assert any(re.match(r"  quickstart.yaml +runs here", line) for line in lines)


def test_doctor_names_a_missing_package(monkeypatch, capsys):
    from specforge.cli import doctor

    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("torch", "safetensors") else find(name))
    assert main() == 1
    assert "missing: torch, safetensors" in capsys.readouterr().out


def test_a_machine_without_cuda_runs_no_recipe_that_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Machine.detect().gpus_gb == ()
    rows = {title.strip(): text for title, text in findings()}
    assert rows["eagle3-deepseek-v3.yaml"].startswith("needs 1 GPU of 41 GB to train, 8 GPUs of 141 GB to capture")
