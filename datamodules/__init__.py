"""LightningDataModules: where a run's batches come from."""

from datamodules.offline import OfflineDataModule

__all__ = ["OfflineDataModule"]
