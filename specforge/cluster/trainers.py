"""The trainers of a run: `specforge fit` on every rank of a worker group of Ray Train.

Checkpoints are SpecForge's own. If a rank dies, Ray Train starts all ranks again, and they resume from the run's last
checkpoint. A rank runs in a thread of its process, where signals do not arrive; the run's board tells it to stop.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ray
import torch
from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.lightning import RayDDPStrategy, RayFSDPStrategy, RayLightningEnvironment
from ray.train.torch import TorchTrainer, get_device

import specforge.stopping as stopping
from specforge.callbacks.checkpoint import find_checkpoint
from specforge.callbacks.strategies import FSDP2Strategy
from specforge.cli import fit
from specforge.cli.arguments import environment_prefix
from specforge.cluster.board import join
from specforge.cluster.launch import Launch
from specforge.errors import mistake_behind
from specforge.files import first_line
from specforge.runtime.addresses import open_metadata
from specforge.runtime.control_plane.claim import live_trainer

_POLL = 0.5  # seconds between two looks at the board


class RayFSDP2Strategy(FSDP2Strategy):
    """``fsdp2`` on the device that Ray gave the rank."""

    @property
    def root_device(self) -> torch.device:
        """The rank's device."""
        return get_device()


STRATEGIES = {"auto": RayDDPStrategy, "ddp": RayDDPStrategy, "fsdp": RayFSDPStrategy, "fsdp2": RayFSDP2Strategy}


class RankCLI(fit.TrainingCLI):
    """TrainingCLI whose ranks, and their devices, are those of Ray; the saved configuration does not mention it."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Each rank is a node with one device."""
        config, ranks = self.config_init["trainer"], get_context().get_world_size()
        config["devices"], config["num_nodes"] = 1, ranks
        if ranks > 1 or config["strategy"] != "auto":
            config["strategy"] = STRATEGIES[config["strategy"]]()
        plugins = config.get("plugins") or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), RayLightningEnvironment()]
        return super().instantiate_trainer(**kwargs)


def train(config: dict[str, Any]) -> None:
    """What a rank does.

    Args:
        config: the ``launch`` and its ``board``.

    Raises:
        UserError: the run is rejected; the board knows why.
    """
    launch, board = config["launch"], config["board"]
    rank = get_context().get_world_rank()
    try:
        join(board, f"trainer {rank}", launch.folder, launch.cluster.trainers.gpus)
        start = broadcast_from_rank_zero(_start(launch, board) if rank == 0 else None)
        if start is None:
            return
        threading.Thread(target=_pass_stop_on, args=(board,), name="board", daemon=True).start()
        _fit(launch.recipe, start)
    except Exception as error:
        mistake = mistake_behind(error)
        if mistake is not None:
            ray.get(board.refuse.remote(str(mistake)))
        else:
            _report(error, Path(launch.run) / "failures.log", rank)
        raise
    finally:
        sys.stdout.flush()
        ray.get(board.stops.remote())  # the board has all lines by then; the process is killed soon


def _report(error: Exception, path: Path, rank: int) -> None:
    """Print an error in one line, and keep the rest: most often another rank has died, and this says little."""
    with path.open("a") as file:
        file.write(f"{time.strftime('%F %T')} trainer {rank}\n{''.join(traceback.format_exception(error))}\n")
    print(f"failed: {type(error).__name__}: {first_line(error)} (more in {path})")


def _start(launch: Launch, board: Any) -> list[str] | None:
    """Words that name the checkpoint to start from, once no other trainer is alive; None if the run is to stop."""
    metadata = open_metadata(launch.producer.metadata, create=True)
    while not ray.get(board.stops.remote()):
        # A rank of the previous group may not have ended yet, or its host is cut off: then its claim has to expire.
        if not live_trainer(metadata, time.time()):
            metadata.close()
            own = find_checkpoint("last", Path(launch.run), launch.copies)
            return ["--ckpt_path", "last"] if own else ["--ckpt_path", launch.ckpt_path] if launch.ckpt_path else []
        time.sleep(_POLL)
    metadata.close()
    return None


def _pass_stop_on(board: Any) -> None:
    while not ray.get(board.stops.remote()):
        time.sleep(_POLL)
    stopping.request()


def _fit(recipe: str, words: list[str]) -> None:
    for name in [name for name in os.environ if name.startswith(environment_prefix("fit"))]:
        del os.environ[name]  # `launch` has read those of its own
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(recipe)
        file.flush()
        fit.main("fit", ["--config", file.name, *words], RankCLI)


class Trainers(threading.Thread):
    """Runs the worker group until the training ends.

    Args:
        launch: the run.
        board: its board.
        folder: where Ray Train keeps its files.

    Attributes:
        error: why it failed, if it did.
    """

    def __init__(self, launch: Launch, board: Any, folder: Path) -> None:
        super().__init__(name="trainers", daemon=True)
        self._most = launch.cluster.max_failures
        each = launch.cluster.trainers
        resources = {"CPU": float(each.cpus)} | ({"GPU": 1.0} if each.gpus else {})
        self._group = TorchTrainer(
            train,
            train_loop_config={"launch": launch, "board": board},
            scaling_config=ScalingConfig(
                num_workers=each.count,
                use_gpu=bool(each.gpus),
                resources_per_worker=resources,
                placement_strategy="PACK" if launch.cluster.placement == "pack" else "SPREAD",
            ),
            run_config=RunConfig(
                name=launch.name,
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=launch.cluster.max_failures),
                logging_config=LoggingConfig(log_level="CRITICAL"),  # on the console; its files hold everything
            ),
        )
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train."""
        try:
            self._group.fit()
        except BaseException as error:
            self.error = error

    def failure(self) -> str:
        """Why it failed, in one line."""
        assert self.error is not None
        if not isinstance(self.error, ControllerError):
            return f"the trainers failed more than {self._most} times, the last time because: {first_line(self.error)}"
        failure = self.error.controller_failure  # such as that the ranks do not reach each other
        return f"the trainers cannot work together: {first_line(getattr(failure, 'cause', None) or failure)}"
