"""`specforge fit` and `validate`: LightningCLI with SpecForge's callbacks, defaults and error messages."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import loggers
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO

import datamodules  # noqa: F401 - registers the built-in classes by name
import lightning_modules
import specforge.stopping as stopping
from lightning_modules.optimizers import OptimizerOptions
from specforge.callbacks.acceptance import AcceptanceLengthEvaluation
from specforge.callbacks.checkpoint import (
    AtomicCheckpointIO,
    BestCheckpoint,
    DraftCheckpoint,
    LastCheckpoint,
    check_folder,
    find_checkpoint,
)
from specforge.callbacks.copies import Copies
from specforge.callbacks.lightning_internals import FitParser, NoExperiment, spawns
from specforge.callbacks.loop import FitLoop
from specforge.callbacks.metrics import TrainingMetrics
from specforge.callbacks.preemption import Preemption
from specforge.callbacks.progress import RunProgress
from specforge.callbacks.report import RunReport
from specforge.callbacks.resume import ExactResume
from specforge.callbacks.strategies import register_strategies
from specforge.cli.arguments import environment_help, expand
from specforge.cli.errors import explain, lightning_refusal
from specforge.cli.help_format import HelpFormatter
from specforge.errors import UserError, mistake_behind
from specforge.files import write_file
from specforge.logs import identify
from specforge.system import keep_freed_memory, multiplies_in

_MODE = "specforge"  # jsonargparse's name for :func:`_load_yaml`
TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/run",
    "gradient_clip_val": 0.5,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
# Defaults of ours that trainer.barebones does not accept.
_NOT_BAREBONES = ("log_every_n_steps", "num_sanity_val_steps", "enable_model_summary")
# Lower bounds that Lightning does not check.
_AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
# What --help shows; Lightning's other options are behind --help.trainer.
_HELP = {
    "config": "recipe or YAML file; may be given more than once, later files override earlier ones",
    "seed_everything": "random seed",
    "model": "the algorithm: Eagle3Module, PEagleModule, DFlashModule, DFlash2Module, DominoModule, DSparkModule, "
    "MTPModule, MedusaModule, HydraModule, StandaloneModule, or the class path of your own; its options are "
    "--model.NAME (see --model.help Eagle3Module)",
    "data": "the source of training samples: OfflineDataModule, OnlineDataModule or DisaggregatedDataModule; its "
    "options are --data.NAME (see --data.help OfflineDataModule)",
    "ckpt_path": "checkpoint to start from: a path, or last or best of the run in trainer.default_root_dir",
    "trainer.default_root_dir": "the run's folder: checkpoints, metrics, logs and report",
    "trainer.max_steps": "stop after this many optimizer steps; -1 for no limit",
    "trainer.max_epochs": "stop after this many epochs; -1 for no limit",
    "trainer.accumulate_grad_batches": "batches per optimizer step",
    "trainer.gradient_clip_val": "maximum norm of the gradient",
    "trainer.val_check_interval": "batches between validations, or a fraction of an epoch",
    "trainer.check_val_every_n_epoch": "epochs between validations; null counts batches across epochs",
    "trainer.limit_val_batches": "batches per validation, or a fraction of them; 0 for no validation",
    "trainer.log_every_n_steps": "optimizer steps between two rows of metrics",
    "trainer.accelerator": "cpu, gpu or auto",
    "trainer.devices": "number of devices per node, a list of them, or auto",
    "trainer.num_nodes": "number of nodes",
    "trainer.strategy": "auto, ddp or fsdp2; for documents too long for one device, ContextDDPStrategy or "
    "ContextFSDP2Strategy, which share each batch among --trainer.strategy.context_size ranks (default: all)",
    "trainer.precision": "32-true, bf16-mixed or bf16-true",
    "trainer.logger": "a logger, such as CSVLogger or WandbLogger (default: TensorBoard in the run's folder)",
    "trainer.callbacks": "callbacks to add, such as LearningRateMonitor",
}
_TITLES = {"model": "Model", "data": "Data", "ckpt_path": "Start", "trainer": "Trainer"}
_DESCRIPTIONS = {
    "fit": "Train a draft. Start from a recipe: specforge fit --config eagle3.yaml (see `specforge recipes`).",
    "launch": "Train a draft on a Ray cluster, or on this machine: a recipe with DisaggregatedDataModule and a section "
    "`cluster` that says how many producers and trainers to start.",
    "validate": "Compute loss and offline tau of a checkpoint on held-out data.",
}
_MORE_HELP = (
    "More options: --help.trainer (all of Lightning's trainer), --model.help Eagle3Module, "
    "--data.help OfflineDataModule (or another class). "
)


class _Parser(FitParser):
    """Parser with our layout of help; jsonargparse makes another one, without ``usage``, for the options of a class."""

    def __init__(self, *args: Any, description: str = "", **kwargs: Any) -> None:
        description = re.sub(r"^Help for --\w+\.help=(.*)", r"Options of \1:", description)
        layout = {"formatter_class": HelpFormatter, "usage": argparse.SUPPRESS}
        super().__init__(*args, description=description, **(layout | kwargs))


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder, and gives it to the loggers as hyperparameters."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing yet: a run that is rejected changes nothing."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, and log the options; a resumed run does so again."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")
        options = yaml.safe_load(self.parser.dump(self.config, skip_validation=True))
        for logger in trainer.loggers:
            logger.log_hyperparams({key: x for key, x in options.items() if key in ("model", "data", "trainer")})

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``config.yaml``."""
        text = self.parser.dump(self.config, skip_unset=False)
        write_file(Path(trainer.default_root_dir) / "config.yaml", text)


class RunLogger(loggers.TensorBoardLogger):
    """TensorBoardLogger that creates its files when training starts: a run that is rejected leaves none."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="tensorboard", version="", default_hp_metric=False)
        self._opened = False

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; before training starts, an object that does nothing."""
        return super().experiment if self._opened else NoExperiment()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write the run's options, the first content of the files."""
        self._opened = True
        super().log_hyperparams(*args, **kwargs)


class TrainingCLI(LightningCLI):
    """LightningCLI with our defaults and one-line errors; a checkpoint does not change the configuration.

    Args:
        command: fit, launch or validate.
        words: its command line.
        callbacks: always added to the trainer's.
    """

    def __init__(self, command: str, words: Sequence[str], callbacks: Sequence[pl.Callback]) -> None:
        self.command = command
        jsonargparse.set_loader(_MODE, _load_yaml, (yaml.YAMLError,))
        description = {"prog": f"specforge {command}", "usage": f"specforge {command} [--config FILE] [options]"}
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": list(callbacks)},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=_Parser,
            parser_kwargs={
                **description,
                "description": _DESCRIPTIONS[command],
                "epilog": _MORE_HELP + environment_help(command),
                "exit_on_error": False,
                "parser_mode": _MODE,
            },
            args=list(words),
            run=False,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the checkpoints under keys of their own, and the arguments of ``Trainer.fit`` or ``validate``."""
        parser.helps, parser.titles = _HELP, _TITLES
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        data = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        name = "validate" if self.command == "validate" else "fit"
        method = inspect.signature(getattr(pl.Trainer, name)).parameters
        self._arguments = parser.add_method_arguments(pl.Trainer, name, skip=data & set(method))

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the command line.

        Raises:
            UserError: one line, with the closest valid name where one is unknown.
        """
        if "--help.trainer" in args:
            parser.shows_all, args = True, ["--help"]
        try:
            self.config = parser.parse_args(_with_save_dir(args))
        except (jsonargparse.ArgumentError, KeyError) as error:
            raise UserError(explain(str(error), self.option_names(), _class_names())) from error

    @classmethod
    def option_names(cls) -> list[str]:
        """Options of the command, including those of the built-in models and data modules."""
        return option_names()

    def before_instantiate_classes(self) -> None:
        """Check the trainer's settings, the run's folder and the checkpoint before anything is built."""
        config = self.config["trainer"]
        for name, least in _AT_LEAST.items():
            if config[name] is not None and config[name] < least:
                raise UserError(f"trainer.{name}: must be at least {least}, not {config[name]}")
        if config["val_check_interval"] == 0:
            raise UserError("trainer.val_check_interval: must be above 0; to skip validation, set limit_val_batches: 0")
        config["default_root_dir"] = os.path.expanduser(config["default_root_dir"] or ".")
        identify(Path(config["default_root_dir"]).absolute().name)
        for logger in config["logger"] if isinstance(config["logger"], list) else [config["logger"]]:
            if isinstance(logger, jsonargparse.Namespace) and logger.get("init_args.save_dir") == "":
                logger["init_args.save_dir"] = config["default_root_dir"]
        run, given = Path(config["default_root_dir"]), self.config["ckpt_path"]
        copies = Copies.at(self.config["checkpoint"]["copy_to"])
        requeued = SLURMEnvironment.detect() and any(run.glob("hpc_ckpt_*.ckpt"))
        if given not in (None, "hpc"):
            found = find_checkpoint(given, run, copies)
            given = None if found is None else str(found)
        self._checkpoint = given
        if self.command != "validate" and not config["fast_dev_run"]:
            check_folder(run, given is not None or requeued, copies)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the checkpoint writer, the progress bar, and TensorBoard unless another logger is configured."""
        config = self.config_init["trainer"]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        kwargs["plugins"] = plugins
        kwargs["precision"] = _precision(config["precision"], config["accelerator"])
        if config["barebones"]:
            kwargs |= {key: None for key in _NOT_BAREBONES if config[key] == TRAINER_DEFAULTS[key]}
        elif config.get("logger") in (None, True):  # a validation adds nothing to the run's files
            kwargs["logger"] = RunLogger(config["default_root_dir"]) if self.command == "fit" else False
        if config.get("enable_progress_bar") is not False and not config["barebones"]:
            self.trainer_defaults["callbacks"].append(RunProgress())  # last, so that it shows the others' values
        if config["barebones"] or config["enable_checkpointing"] is False:
            self.parser.callback_keys.clear()  # LastCheckpoint and BestCheckpoint
        trainer = super().instantiate_trainer(**kwargs)
        if spawns(trainer):
            raise UserError(f"trainer.strategy: {config['strategy']} is not supported; use ddp")
        trainer.fit_loop = FitLoop(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, DraftCheckpoint):
                given = self.config["ckpt_path"]
                callback.named = None if given in ("last", "best") else given
        return trainer

    def run(self) -> None:
        """Train, or validate and print the metrics."""
        arguments = {name: self.config_init[name] for name in self._arguments} | {"ckpt_path": self._checkpoint}
        if self.command == "fit":
            self.trainer.fit(self.model, datamodule=self.datamodule, **arguments)
            return
        shown = arguments.pop("verbose")
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False, **arguments)
        metrics = self.trainer.callback_metrics
        if shown and self.trainer.is_global_zero:
            width = max(map(len, metrics), default=0)
            print("\n".join(f"{name:<{width}}  {metrics[name]:.4g}" for name in sorted(metrics)))


def _precision(wanted: Any, accelerator: Any) -> Any:
    """fp32 instead of mixed precision on a CPU that would emulate bf16."""
    others = (CUDAAccelerator, MPSAccelerator)
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not any(x.is_available() for x in others))
    if wanted not in ("bf16", "bf16-mixed") or not on_cpu or multiplies_in(torch.bfloat16, "cpu") == torch.bfloat16:
        return wanted
    pl.utilities.rank_zero_info("trainer.precision: this CPU has no bf16 instructions; training multiplies in fp32")
    return "32-true"


def _with_save_dir(words: Sequence[str]) -> list[str]:
    """Set an empty save_dir, which becomes the run's folder, for a logger that the command line names."""
    result: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        result.append(word)
        option, _, value = word.partition("=")
        if _needs_folder(value if option == "--trainer.logger" else word if before == "--trainer.logger" else None):
            result.append("--trainer.logger.save_dir=")
    return result


def _load_yaml(text: str) -> Any:
    """Load YAML; a logger in it that has no save_dir gets an empty one, as :func:`_with_save_dir` does."""
    loaded = jsonargparse.get_loader("yaml")(text)
    trainer = loaded.get("trainer") if isinstance(loaded, dict) else None
    if isinstance(trainer, dict) and trainer.get("logger"):
        given = trainer["logger"]
        trainer["logger"] = [_in_folder(x) for x in given] if isinstance(given, list) else _in_folder(given)
    return loaded


def _in_folder(logger: Any) -> Any:
    logger = {"class_path": logger} if _needs_folder(logger) else logger
    if isinstance(logger, dict) and _needs_folder(logger.get("class_path")):
        return {**logger, "init_args": {"save_dir": "", **(logger.get("init_args") or {})}}
    return logger


def _needs_folder(name: Any) -> bool:
    """Whether a name is that of a Lightning logger that writes into a folder."""
    name = name.rpartition(".")[2] if isinstance(name, str) else ""
    return name in loggers.__all__ and "save_dir" in inspect.signature(getattr(loggers, name)).parameters


def option_names() -> list[str]:
    """Options of a run, including those of the built-in models and data modules."""
    data = [cls for cls in _subclasses(pl.LightningDataModule) if cls.__module__.split(".")[0] == "datamodules"]
    models = list(lightning_modules.algorithms().values())
    classes: dict[str, list[Any]] = {"trainer": [pl.Trainer], "model.init_args": models, "data.init_args": data}
    classes |= {
        "model.init_args.optimizer": [OptimizerOptions],
        "checkpoint": [LastCheckpoint],
        "best_checkpoint": [BestCheckpoint],
    }
    keys = ["seed_everything", "ckpt_path", "model", "data"]
    for prefix, found in classes.items():
        for cls in found:
            keys += jsonargparse.ArgumentParser().add_class_arguments(cls, prefix)
    return list(dict.fromkeys(keys))


def _class_names() -> list[str]:
    return [cls.__name__ for base in (pl.LightningModule, pl.LightningDataModule) for cls in _subclasses(base)]


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [x for child in children for x in (child, *_subclasses(child))]


def main(command: str, words: Sequence[str], cli: type[TrainingCLI] = TrainingCLI) -> int:
    """Run `specforge fit` or `validate`.

    Args:
        command: fit or validate.
        words: its command line.
        cli: parses it and builds the trainer.

    Returns:
        The exit status: 143 after a signal, else 0.

    Raises:
        UserError: a setting is not accepted.
    """
    words = expand(command, words)
    _silence()
    keep_freed_memory()
    register_strategies()
    preemption = Preemption()
    callbacks = [ExactResume(), AcceptanceLengthEvaluation(), TrainingMetrics(), preemption, RunReport()]
    sys.argv = [sys.argv[0], command, *words]  # Lightning's launcher starts the other ranks with it
    try:
        with stopping.signals_stop():
            cli(command, words, callbacks).run()
            return 0
    except stopping.Stopped:
        return preemption.end()
    except SystemExit as end:
        if stopping.interrupted():  # Lightning turns it into an exit
            raise KeyboardInterrupt from end
        raise
    except Exception as error:
        mistake = mistake_behind(error)
        if mistake is not None:
            return preemption.fail(mistake)
        keys = inspect.signature(pl.Trainer).parameters
        line = lightning_refusal(error, keys, stopping.began())
        if line is None:
            raise
        raise UserError(line) from error


def _silence() -> None:
    """Silence Lightning's warnings about things that are as intended."""
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*LeafSpec.*is deprecated.*",
        r".*self\.log\('val/.*sync_dist=True.*",  # these metrics are those of all ranks
        ".*exists and is not empty.*",
        ".*is smaller than the logging interval.*",
        r".*add the following callbacks: \[.(?:Last|Best)Checkpoint.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning|jsonargparse")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
