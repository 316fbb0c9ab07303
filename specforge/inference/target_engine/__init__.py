"""Engines that run the frozen target, with a common interface."""

from specforge.inference.target_engine.base import TargetEngine
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.inference.target_engine.http import HTTPTargetEngine

__all__ = ["HFTargetEngine", "HTTPTargetEngine", "TargetEngine"]
