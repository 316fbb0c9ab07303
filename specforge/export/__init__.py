"""Drafts in the form that servers load, and from the form that others write."""

from specforge.export.format import DraftFormat

__all__ = ["DraftFormat"]
