"""Distillation losses and their chunked linear form."""

from specforge.losses.chunked import DistillationResult, TeacherRows, chunked_distillation
from specforge.losses.features import feature_distance
from specforge.losses.objectives import make_objective

__all__ = ["DistillationResult", "TeacherRows", "chunked_distillation", "feature_distance", "make_objective"]
