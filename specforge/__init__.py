"""SpecForge: train speculative-decoding drafts, measure their acceptance length, export them to SGLang and vLLM.

The names below are imported on first use, so that ``import specforge`` does not import torch.

Docstrings give the shapes of tensors. N: tokens of a packed batch; L: tokens of a document; R: query rows; M:
supervised tokens (labels); T: steps of the training-time test, or students per label; H: hidden size; A: width of
the captured layers; V: vocabulary; D: draft vocabulary; h, k: query and key heads; d: head size; γ (gamma): tokens
drafted per round; τ (tau): acceptance length.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from specforge.packages import VERSION

if TYPE_CHECKING:
    from specforge.api import CaptureOptions, EvaluateOptions, algorithms, capture, evaluate, load_draft

__version__ = VERSION
__all__ = ["CaptureOptions", "EvaluateOptions", "__version__", "algorithms", "capture", "evaluate", "load_draft"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("specforge.api"), name)
    raise AttributeError(f"module 'specforge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
