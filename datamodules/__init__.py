"""LightningDataModules: the sources of training batches."""

from datamodules.disaggregated import DisaggregatedDataModule
from datamodules.offline import OfflineDataModule
from datamodules.online import OnlineDataModule

__all__ = ["DisaggregatedDataModule", "OfflineDataModule", "OnlineDataModule"]
