"""LightningDataModules: where a run's batches come from."""

from datamodules.offline import OfflineDataModule
from datamodules.online import OnlineDataModule

__all__ = ["OfflineDataModule", "OnlineDataModule"]
