"""Losses of a draft's rows, and the tiled form that computes them without storing logits."""

from specforge.losses.objectives import feature_distance, make_objective
from specforge.losses.tiled import Correction, TeacherRows, TiledLoss, tiled_loss

__all__ = ["Correction", "TeacherRows", "TiledLoss", "feature_distance", "make_objective", "tiled_loss"]
