"""`specforge fit|validate|test`: LightningCLI over the algorithms and datamodules."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO

import datamodules  # noqa: F401 - makes the built-in classes known by name
import lightning_modules
from specforge import stopping
from specforge.callbacks.acceptance import AcceptanceLengthEvaluation
from specforge.callbacks.checkpoint import (
    AtomicCheckpointIO,
    BestCheckpoint,
    DraftCheckpoint,
    LastCheckpoint,
    check_folder,
    find_checkpoint,
)
from specforge.callbacks.loop import FitLoop
from specforge.callbacks.metrics import TrainingMetrics
from specforge.callbacks.preemption import Preemption
from specforge.callbacks.report import RunReport
from specforge.callbacks.resume import ExactResume
from specforge.callbacks.strategies import register_strategies
from specforge.cli.refusals import bound_yaml, lightning_refusal
from specforge.errors import UserError, mistake_behind
from specforge.files import write_file
from specforge.system import keep_freed_memory

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/run",
    "gradient_clip_val": 0.5,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
# Which are not to be given with trainer.barebones.
BAREBONES = ("log_every_n_steps", "num_sanity_val_steps", "enable_model_summary")

# Options of the trainer that Lightning takes as they are, whatever follows from them.
AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: a start that is refused changes nothing."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file; a resumed run writes it again."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``config.yaml``."""
        text = self.parser.dump(self.config, skip_none=False)
        write_file(Path(trainer.default_root_dir) / "config.yaml", text)


class RunLogger(TensorBoardLogger):
    """TensorBoard's, which has no files before there is something to log: a start that is refused leaves none."""

    def __init__(self, folder: str, at_once: bool) -> None:
        super().__init__(folder, name="tensorboard", version="")
        self._opened = at_once

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; before the first metrics something that does nothing."""
        return super().experiment if self._opened else _DummyExperiment()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write metrics."""
        self._opened = True
        super().log_metrics(metrics, step)


class TrainingCLI(LightningCLI):
    """LightningCLI with our defaults, one-line errors, and a resume that does not change the configuration."""

    command = "fit"

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that was asked for: building a parser costs a second."""
        return {cls.command: LightningCLI.subcommands()[cls.command]}

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Checkpoints are configured under their own keys."""
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; a mistake becomes one line with the nearest valid name."""
        subparser = self._subcommand_parsers[self.command]
        parser.exit_on_error = subparser.exit_on_error = False
        try:
            self.config = parser.parse_args(args)
        except (jsonargparse.ArgumentError, KeyError) as error:
            raise UserError(explain(str(error), known_keys(subparser))) from error

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given: Lightning would let the checkpoint's override it."""

    def before_instantiate_classes(self) -> None:
        """Look at the run's folder and the checkpoint before anything is built."""
        config = self._get(self.config, "trainer")
        for name, least in AT_LEAST.items():
            if config[name] is not None and config[name] < least:
                raise UserError(f"trainer.{name}: must be at least {least}, not {config[name]}")
        if config["val_check_interval"] == 0:
            raise UserError("trainer.val_check_interval: must be above 0; limit_val_batches: 0 validates nothing")
        config["default_root_dir"] = os.path.expanduser(config["default_root_dir"] or ".")
        run, given = Path(config["default_root_dir"]), self._get(self.config, "ckpt_path")
        requeued = SLURMEnvironment.detect() and any(run.glob("hpc_ckpt_*.ckpt"))
        if given not in (None, "hpc"):
            found = find_checkpoint(given, run)
            given = None if found is None else str(found)
        self._checkpoint = given
        if self.command == "fit" and not config["fast_dev_run"]:
            check_folder(run, resumes=given is not None or requeued)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": self._checkpoint}

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the checkpoint writer and, unless another is configured, the TensorBoard logger."""
        config = self._get(self.config_init, "trainer", default={})
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        kwargs["plugins"] = plugins
        if config["barebones"]:
            kwargs |= {key: None for key in BAREBONES if config[key] == TRAINER_DEFAULTS[key]}
        elif config.get("logger") in (None, True):
            kwargs["logger"] = RunLogger(config["default_root_dir"], at_once=self.command != "fit")
        if config.get("enable_progress_bar") is not False and not config["barebones"]:
            kwargs["callbacks"] = [*(config.get("callbacks") or []), ProgressBar(refresh_rate=20)]
        if config["barebones"] or config["enable_checkpointing"] is False:
            self._parser(self.subcommand).callback_keys.clear()  # of LastCheckpoint and BestCheckpoint
        trainer = super().instantiate_trainer(**kwargs)
        if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":  # which needs to pickle the trainer
            raise UserError(f"trainer.strategy: {config['strategy']} is not supported; use ddp")
        trainer.fit_loop = FitLoop(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, DraftCheckpoint):
                given = self._get(self.config, "ckpt_path")
                callback.named = None if given in ("last", "best") else given
        return trainer


class ProgressBar(RichProgressBar):
    """Lightning's, which calls the last epoch of a run that steps alone bound -2."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")


def known_keys(parser: Any) -> list[str]:
    """Every option of a parser, the class options of the built-in models and data included."""
    keys = [action.dest for action in parser._actions]
    models: list[type] = list(lightning_modules.algorithms().values())
    for base, classes in (("model", models), ("data", _subclasses(pl.LightningDataModule))):
        for cls in classes:
            if cls.__module__.split(".")[0] in ("lightning_modules", "datamodules"):
                keys += jsonargparse.ArgumentParser().add_class_arguments(cls, f"{base}.init_args")
    return keys


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [x for child in children for x in (child, *_subclasses(child))]


def explain(message: str, keys: list[str]) -> str:
    """The useful line of a parser's error, with the nearest valid option where one was not accepted."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = re.sub(r"^error: ", "", lines[0]) if lines else "unknown error"
    for line in lines:
        for pattern in (
            r"does not accept option '([\w.]+)'",
            r"Option '([\w.]+)' is not accepted",
            r"[Kk]ey '([\w.]+)' is not",
            r"[Uu]nrecognized arguments: --?([\w.]+)",
            r"No action for key \"?'?([\w.]+)",
        ):
            match = re.search(pattern, line)
            if match:
                return _nearest(match.group(1), keys)
    unknown = re.search(r"Expected a dot import path string: (\w+)", message)
    if unknown:
        names = [c.__name__ for base in (pl.LightningModule, pl.LightningDataModule) for c in _subclasses(base)]
        close = get_close_matches(unknown.group(1), names, 1, 0.5)
        return f"no class '{unknown.group(1)}'" + (f"; did you mean '{close[0]}'?" if close else "")
    places = [(i, m.group(1)) for i, line in enumerate(lines) if (m := re.search(r'Parser key "([\w.]+)"', line))]
    if places:
        key, after = ".".join(name for _, name in places), lines[places[-1][0] + 1 :]
        bounds = next((m.group(1) for line in after if (m := re.search(r"Not of type (an? .+?): ", line))), None)
        if bounds is not None:  # one of specforge.options
            given = r": (\S+) does not conform|with base 10: (\S+)|to float: (\S+)|Given value: ([^\s(]+)$"
            value = next((x.strip("'") for line in after for x in (re.findall(given, line) or [()])[0] if x), None)
            return f"{key}: must be {bounds}" + (f", not {value}" if value else "")
        detail = next((line.lstrip("- ") for line in after if "Expected" in line), "not valid")
        return f"{key}: {_in_words(detail)}"[:400]
    return text[:400]


_KINDS = {
    "list": "a list, such as [1, 2]",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "dict": "fields with values",
}


def _in_words(detail: str) -> str:
    """What the parser expected, without Python's names for it."""
    detail = re.sub(r"\. Got value: (.*)", r", not \1", detail)
    detail = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"must be one of \1", detail)
    kind = re.match(r"Expected an? <class '(\w+)'>", detail)
    if kind is None or kind[1] not in _KINDS:
        return detail
    return f"must be {_KINDS[kind[1]]}{detail[kind.end() :]}"


def _nearest(name: str, keys: list[str]) -> str:
    last = name.rsplit(".", 1)[-1]
    close = get_close_matches(name, keys, 1, 0.75) or [
        key for key in keys if get_close_matches(last, [key.rsplit(".", 1)[-1]], 1, 0.7)
    ]
    hint = f"; did you mean '{close[0].replace('.init_args', '')}'?" if close else ""
    return f"unknown option '{name}'{hint}"


def main(argv: list[str]) -> int:
    """Run one of Lightning's subcommands.

    Returns:
        The exit status: 143 after a signal, else 0.
    """
    bound_yaml(argv)
    _quiet()
    keep_freed_memory()
    register_strategies()
    preemption = Preemption()
    try:
        with stopping.signals_stop():
            _run(argv, preemption)
            return 0
    except stopping.Stopped:
        return preemption.end()
    except SystemExit as end:
        if stopping.interrupted():  # Lightning makes an exit of it
            raise KeyboardInterrupt from end
        raise
    except Exception as error:
        keys = inspect.signature(pl.Trainer).parameters
        line = None if mistake_behind(error) else lightning_refusal(error, keys, stopping.began())
        if line is None:
            raise
        raise UserError(line) from error


def _run(argv: list[str], preemption: Preemption) -> None:
    always = [ExactResume(), AcceptanceLengthEvaluation(), TrainingMetrics(), preemption, RunReport()]
    command = type("Command", (TrainingCLI,), {"command": argv[0]})
    sys.argv = [sys.argv[0], *argv]  # Lightning's launcher starts the other ranks with it
    command(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": always},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "specforge", "default_env": True, "env_prefix": "SPECFORGE"},
    )


def _quiet() -> None:
    """Silence what Lightning says of things that are as they should be."""
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*GPU available but not used.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*LeafSpec.*is deprecated.*",
        ".*exists and is not empty.*",
        r".*add the following callbacks: \[.(?:Last|Best)Checkpoint.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning|jsonargparse")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
