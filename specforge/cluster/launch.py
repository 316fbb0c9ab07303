"""A run on a cluster, as its processes see it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import yaml

from specforge.callbacks.copies import Copies
from specforge.cli.produce import ProduceOptions
from specforge.cluster.options import ClusterOptions


@dataclass(frozen=True)
class Launch:
    """A run on a cluster.

    Attributes:
        name: its name in the cluster.
        folder: the folder in which the user started it; relative paths refer to it.
        run: the run's folder.
        recipe: YAML text for `specforge fit`, the same for every rank.
        ckpt_path: the checkpoint to start from while the run has none of its own.
        producer: what every producer does; its stores are the trainers'.
        cluster: how many processes there are.
    """

    name: str
    folder: str
    run: str
    recipe: str
    ckpt_path: str | None
    producer: ProduceOptions
    cluster: ClusterOptions

    @property
    def max_bytes(self) -> int:
        """Upper limit of what is in the store."""
        return int(yaml.safe_load(self.recipe)["data"]["init_args"]["max_bytes"])

    @property
    def copies(self) -> Copies | None:
        """Copies of the run's checkpoints, if there are to be any."""
        return Copies.at(yaml.safe_load(self.recipe)["checkpoint"]["copy_to"])

    def at(self, **stores: str) -> Launch:
        """The run with other addresses of its ``store`` or ``metadata``."""
        recipe = yaml.safe_load(self.recipe)
        recipe["data"]["init_args"] |= stores
        text = yaml.safe_dump(recipe, sort_keys=False)
        return replace(self, recipe=text, producer=replace(self.producer, **stores))  # type: ignore[arg-type]
