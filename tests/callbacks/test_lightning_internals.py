"""Private names of Lightning and jsonargparse: all in one file, and all still there."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning.fabric.loggers.logger
import lightning.pytorch as pl
import lightning.pytorch.loops.fit_loop
import lightning.pytorch.loops.utilities
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import call

import specforge.callbacks.lightning_internals as internals
from tests.test_imports import modules

FILE = Path(internals.__file__)


def private(path: Path) -> set[str]:
    """Private names that a file reads from other objects, imports, or overrides by assignment."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            found |= {x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


@pytest.fixture(scope="module")
def owners() -> dict[str, object]:
    """What each private name is an attribute of."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    spawning = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    parser = internals.FitParser()
    checkpoint = ModelCheckpoint(every_n_train_steps=3)
    owned = [
        (trainer, ("_signal_connector", "_accelerator_connector", "_logger_connector")),
        (trainer._logger_connector, ("_first_loop_iter",)),
        (trainer.fit_loop, ("_data_fetcher",)),
        (trainer.fit_loop.epoch_loop, ("_broadcast_sigterm_tensor", "_should_check_val_fx")),
        (trainer.fit_loop.epoch_loop.val_loop, ("_on_before_fetch", "_on_after_fetch")),
        (spawning.strategy.launcher, ("_start_method",)),
        (call, ("_call_teardown_hook", "_call_callbacks_state_dict")),
        (ModelParallelStrategy(), ("_data_parallel_size",)),
        (checkpoint, ("_save_checkpoint", "_should_skip_saving_checkpoint")),
        (checkpoint, ("_last_global_step_saved", "_every_n_train_steps")),
        (parser, ("_actions", "_action_groups")),
        (parser._action_groups[0], ("_group_actions",)),
        (lightning.fabric.loggers.logger, ("_DummyExperiment",)),
        (lightning.pytorch.loops.fit_loop, ("_FitLoop",)),
        (lightning.pytorch.loops.utilities, ("_is_max_limit_reached",)),
    ]
    return {name: owner for owner, names in owned for name in names}


def test_every_private_name_still_exists(owners):
    assert set(owners) == private(FILE) - {"_then"}
    for name, owner in owners.items():
        assert hasattr(owner, name), name
    assert hasattr(pl.Trainer().fit_loop.epoch_loop, "_on_before_fetch")
    assert callable(owners["_signal_connector"]._signal_connector.register_signal_handlers)
    assert hasattr(owners["_accelerator_connector"]._accelerator_connector, "cluster_environment")


def test_no_other_file_uses_a_private_name_of_lightning(owners):
    lightning_own = set(owners) | {"_trainer", "_device_mesh", "_get", "_subcommand_parsers", "_parse_ckpt_path"}
    for module, path in modules():
        if path == FILE:
            continue
        assert not private(path) & lightning_own, module
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lightning", "jsonargparse"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module
