"""The progress of a run in one line: steps, time left, loss, tokens/s, peak memory and tau."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class RunProgress(RichProgressBar):
    """Placeholder until the progress line is written."""
