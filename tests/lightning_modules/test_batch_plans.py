"""The plan of a training batch is made with the batch, in the thread that fetches it, and once."""

from __future__ import annotations

import threading

import pytest

from lightning_modules import algorithms
from specforge.cli.main import main
from tests.tiny import recipe

SMALL = {"num_hidden_layers": 1, "draft_vocab_size": 64}
MODULES = {
    "eagle3": ("Eagle3Module", SMALL),
    "peagle": ("PEagleModule", SMALL),
    "dflash": ("DFlashModule", {**SMALL, "block_size": 4}),
}


@pytest.mark.parametrize("name", MODULES)
def test_plans_are_made_by_the_fetching_threads(name, target, features, tmp_path, monkeypatch):
    class_path, config = MODULES[name]
    cls, threads, trained = algorithms()[name], [], []
    plan, loss = cls.training_plan, cls.training_loss

    def planned(self, batch):
        threads.append(threading.current_thread())
        return plan(self, batch)

    def with_its_plan(self, batch, head):
        assert vars(batch.plan)["labels"].equal(vars(plan(self, batch))["labels"])
        trained.append(batch.cursor)
        return loss(self, batch, head)

    monkeypatch.setattr(cls, "training_plan", planned)
    monkeypatch.setattr(cls, "training_loss", with_its_plan)
    model = {
        "class_path": class_path,
        "init_args": {"target": str(target), "draft_config": config, "layer_ids": [1, 3, 4]},
    }
    assert main(["fit", "--config", str(recipe(target, features, tmp_path, model=model, trainer__max_steps=10))]) == 0
    assert len(trained) == 10
    assert threading.main_thread() not in threads
    assert 10 <= len(threads) <= 10 + 3  # those fetched ahead and never trained
