"""What revision 60c5b28 wrote is read, resumed and exported.

`fixtures/60c5b28` was made by that revision alone, in a folder of its own, on the CPU with one thread::

    write_target("target", hidden=8, heads=2); conversations 5 to 17 of tests/tiny.py
    specforge prepare --data conversations.jsonl --target target --output prompts
    specforge capture --target target --prompts prompts --output features --dtype float32 --batch_tokens 1
    specforge fit --config undisturbed.yaml                        # metrics.jsonl, weights.safetensors; 8 steps
    specforge fit --config offline/recipe.yaml --trainer.max_steps 4
    specforge export --draft offline/run/checkpoints/last.ckpt --output sglang --to sglang     # and hf
    specforge produce --target target --store store --metadata metadata.db --name producer     # killed with
    specforge fit --config disaggregated/recipe.yaml                                           # after step 4

On the machine where it was made, both resumed runs end with the weights of `weights.safetensors` bit for bit.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specforge.cli.main import main
from tests.disaggregated import assert_nothing_is_left, control, producers
from tests.test_training import fit, losses, weights

FIXTURE = Path(__file__).parent / "fixtures" / "60c5b28"
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # of other processors and other releases of torch
WHERE = {"store": "store", "metadata": "metadata.db"}


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """A copy as the current folder, since what was written names its places relative to that."""
    folder = tmp_path / "written"
    shutil.copytree(FIXTURE, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def files(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_ends_as_the_undisturbed_run(run: Path) -> None:
    assert losses(run) == pytest.approx(losses(Path()), rel=1e-4)
    torch.testing.assert_close(weights(run), load_file("weights.safetensors"), **CLOSE)


def test_a_capture_into_its_features_finds_them_whole(written, capsys):
    before = files("features")
    words = "--target target --prompts prompts --output features --dtype float32 --batch_tokens 1"
    assert main(["capture", *words.split()]) == 0
    assert files("features") == before
    said = capsys.readouterr().out
    for split, samples in (("train", 10), ("heldout", 3)):
        line = rf"features/{split}: {samples} samples, 0\.\d\d MB \(0 tokens captured by this run\)"
        assert re.search(line, said), said


def test_an_offline_run_resumes(written):
    assert_ends_as_the_undisturbed_run(fit(Path("offline/recipe.yaml"), "--ckpt_path", "last"))


def test_an_interrupted_disaggregated_run_resumes(written, capsys):
    assert main(["status", *["--store", "store", "--metadata", "metadata.db", "--seconds", "0"]]) == 0
    assert "8 committed, 9 delivered, 0 trained, 14 durable" in capsys.readouterr().out
    trained = sum(control(WHERE).counts().values()) - 3  # the held-out samples
    with producers(Path("target"), WHERE, 1):
        run = fit(Path("disaggregated/recipe.yaml"), "--ckpt_path", "last")
    assert_ends_as_the_undisturbed_run(run)
    assert_nothing_is_left(WHERE, trained=trained)


@pytest.mark.parametrize("form", ["sglang", "hf"])
def test_its_checkpoints_are_exported_as_it_exported_them_and_in_the_same_place(written, form):
    before = load_file(f"{form}/model.safetensors")
    words = ["--to", form, "--output", form]
    assert main(["export", "--draft", "offline/run/checkpoints/last.ckpt", *words]) == 0
    after = load_file(f"{form}/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_its_exports_are_evaluated_and_trained_on(written):
    words = "--target target --prompts prompts/heldout --num_prompts 1 --max_new_tokens 4 --speed_prompts 0"
    assert main(["evaluate", "--draft", "hf", *words.split()]) == 0
    fit(Path("offline/recipe.yaml"), "--model.init_from", "hf", "--trainer.default_root_dir", "again")


def test_prompts_made_again_replace_its_prompts(written):
    assert main(["prepare", *["--data", "conversations.jsonl", "--target", "target", "--output", "prompts"]]) == 0
