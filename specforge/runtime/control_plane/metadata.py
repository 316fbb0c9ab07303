"""Where the states of samples are kept: prompt, committed, delivered, trained, durable.

A sample is *trained* at an optimizer step and *durable* when a checkpoint that covers the step is complete.
Offline and in-process runs need no such record: their samples can be read again, and the checkpoint's data
cursor says which were trained. They use the null store, whose every method does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specforge.contracts import SampleRef


class MetadataStore(Protocol):
    """States of samples by identity; metadata only, no tensor ever enters."""

    def commit(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Record samples whose features are in the store.

        Returns:
            For each, whether it is new (False: the same identity was committed before).
        """
        ...

    def deliver(self, sample_ids: Sequence[str]) -> None:
        """Record that a trainer was given the samples."""
        ...

    def mark_trained(self, sample_ids: Sequence[str], step: int) -> None:
        """Record that optimizer step ``step`` used the samples."""
        ...

    def mark_durable(self, step: int) -> list[str]:
        """Record a complete checkpoint of ``step``.

        Returns:
            Samples that this made durable; their features may be freed.
        """
        ...

    def rewind(self, step: int) -> list[str]:
        """Forget what was trained after ``step``, the step of the checkpoint that a run resumes from.

        Returns:
            Samples to deliver again.
        """
        ...


class NullMetadataStore:
    """Keeps nothing; the control plane of a run that has none."""

    def commit(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Every sample is new."""
        return [True] * len(refs)

    def deliver(self, sample_ids: Sequence[str]) -> None:
        """Nothing to record."""

    def mark_trained(self, sample_ids: Sequence[str], step: int) -> None:
        """Nothing to record."""

    def mark_durable(self, step: int) -> list[str]:
        """Nothing becomes durable."""
        return []

    def rewind(self, step: int) -> list[str]:
        """Nothing to deliver again."""
        return []
