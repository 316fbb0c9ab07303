"""Engines that run the frozen target, behind one protocol."""

from specforge.inference.target_engine.base import TargetEngine
from specforge.inference.target_engine.hf import HFTargetEngine

__all__ = ["HFTargetEngine", "TargetEngine"]
