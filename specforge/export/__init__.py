"""Drafts in the form that servers load."""

from specforge.export.eagle3 import to_hf, to_sglang

__all__ = ["to_hf", "to_sglang"]
