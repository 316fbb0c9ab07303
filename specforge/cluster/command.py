"""`specforge launch`: a recipe, and the section `cluster` that says where it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from specforge.callbacks.checkpoint import find_checkpoint
from specforge.callbacks.copies import Copies
from specforge.cli.arguments import expand
from specforge.cli.fit import TrainingCLI
from specforge.cli.produce import ProduceOptions
from specforge.cluster.launch import Launch
from specforge.cluster.options import MADE, ClusterOptions
from specforge.console import say
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.options import PositiveInt
from specforge.packages import install_hint

# The first of the configuration files, so that a recipe need not name any stores.
_STORES = {"data": {"class_path": "DisaggregatedDataModule", "init_args": {"store": MADE, "metadata": MADE}}}
_STRATEGIES = ("auto", "ddp", "fsdp", "fsdp2")
_OWN = ("cluster", "plan", "scale", "config")  # keys that `specforge fit` does not have


class LaunchCLI(TrainingCLI):
    """Parses a recipe with its section `cluster` and checks both; builds nothing."""

    def __init__(self, words: Sequence[str]) -> None:
        logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # the ranks say it
        super().__init__("launch", ["--config", yaml.safe_dump(_STORES), *words], [])

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the options that are not the recipe's."""
        parser.add_argument("--plan", type=bool, default=False, help="print what would be started where; start nothing")
        parser.add_argument(
            "--scale",
            type=PositiveInt | None,
            default=None,
            help="change the number of producers of the run that is going on; start nothing",
        )
        parser.add_class_arguments(ClusterOptions, "cluster")
        super().add_arguments_to_parser(parser)

    @classmethod
    def option_names(cls) -> list[str]:
        """Options of the command, including those of the built-in models and data modules."""
        own = jsonargparse.ArgumentParser().add_class_arguments(ClusterOptions, "cluster")
        return ["plan", "scale", *own, *super().option_names()]

    def before_instantiate_classes(self) -> None:
        """Check a run that is to be started."""
        if self.config.scale is None:
            super().before_instantiate_classes()

    def instantiate_classes(self) -> None:
        """Build nothing."""


def main(command: str, words: Sequence[str]) -> int:
    """Run `specforge launch`; returns the exit status: 143 after a signal, else 0.

    Raises:
        UserError: Ray is not installed, an option is not accepted, or the run cannot be started or has failed.
    """
    cli = LaunchCLI(expand(command, words))
    if find_spec("ray") is None:
        raise UserError(f"launch needs Ray: {install_hint('ray')}")
    launch = read(cli.parser, cli.config)
    from specforge.cluster import driver

    if cli.config.scale is not None:
        return driver.scale(launch, cli.config.scale)
    if cli.config.plan:
        say("\n".join(driver.plan(launch)))
        return 0
    return driver.run(launch)


def read(parser: Any, config: jsonargparse.Namespace) -> Launch:
    """The run that a parsed configuration describes.

    Raises:
        UserError: it is not a disaggregated run, or an option conflicts with the cluster.
    """
    data, trainer = config.data, config.trainer
    if data.class_path.rpartition(".")[2] != "DisaggregatedDataModule":
        raise UserError(f"data: launch trains with DisaggregatedDataModule, not {data.class_path}")
    if trainer.strategy not in _STRATEGIES:
        raise UserError(f"trainer.strategy: must be one of {', '.join(_STRATEGIES)}")
    cluster = _cluster(config)
    producers = cluster.producers
    if producers.max_count is not None and producers.max_count < producers.count:
        raise UserError(f"cluster.producers.max_count {producers.max_count}: must be at least count {producers.count}")
    options, target = data.init_args, config.model.init_args.target
    TargetFiles.find(target)
    run = trainer.default_root_dir
    recipe = yaml.safe_load(parser.dump(config, skip_unset=False))
    ckpt_path = recipe["ckpt_path"]
    copies = Copies.at(recipe["checkpoint"]["copy_to"])
    if ckpt_path not in (None, "last") and find_checkpoint("last", Path(run), copies):
        raise UserError(
            f"--ckpt_path {ckpt_path}: trainers that are started again resume from the run's last checkpoint, so "
            "only last is accepted; to start from another one, choose another trainer.default_root_dir"
        )
    recipe = {key: value for key, value in recipe.items() if key not in (*_OWN, "ckpt_path")}
    accelerator = "gpu" if cluster.trainers.gpus else "cpu"
    recipe["trainer"] |= {"devices": cluster.trainers.count, "num_nodes": 1, "accelerator": accelerator}
    launch = Launch(
        name=cluster.name or Path(run).absolute().name,
        folder=os.getcwd(),
        run=run,
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        ckpt_path=None if ckpt_path == "last" else ckpt_path,
        producer=ProduceOptions(
            target=target,
            store=options.store,
            metadata=options.metadata,
            engine=producers.engine,
            max_prompts=producers.max_prompts,
            batch_tokens=producers.batch_tokens,
            lease_seconds=options.lease_seconds,
            max_tries=options.max_tries,
        ),
        cluster=cluster,
    )
    if options.store != MADE and cluster.store_bytes:
        raise UserError("cluster.store_bytes: the features are in data.store; leave one of them out")
    if options.store == MADE and not cluster.store_bytes:
        launch = launch.at(store=str(Path(run) / "store"))
    if options.metadata == MADE and cluster.address is None:
        launch = launch.at(metadata=str(Path(run) / "metadata.db"))
    return launch


def _cluster(config: jsonargparse.Namespace) -> ClusterOptions:
    """The section `cluster`, without building the rest of the configuration."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ClusterOptions, "cluster")
    built: ClusterOptions = parser.instantiate(parser.parse_object({"cluster": config.cluster.as_dict()})).cluster
    return built
