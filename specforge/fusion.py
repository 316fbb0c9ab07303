"""Element-wise work around matrix products, compiled to single kernels on GPUs.

A training step spends half of its time outside matrix products if every operation is a kernel of its own. Functions
marked with :func:`fused` are compiled by ``torch.compile`` when they are given tensors on a GPU, one graph for any
number of rows; on a CPU, and for a few rows, they run as they are written. The compiled code is kept on disk by
PyTorch (``TORCHINDUCTOR_CACHE_DIR``), so that only the first run on a machine waits for the compiler.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_allowed = True


def allow_fusion(allowed: bool) -> None:
    """Switch compilation on or off for the whole process."""
    global _allowed
    _allowed = allowed


def fused(*, gradient: bool = False, **varying: tuple[int, ...]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function for compilation on GPUs.

    The function takes positional arguments and must not modify them.

    Args:
        gradient: whether it carries gradients, which are compiled as well.
        varying: for each tensor argument with sizes that differ from call to call, those dimensions. The first argument
            named decides whether to compile.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        places = [(list(inspect.signature(function).parameters).index(name), dims) for name, dims in varying.items()]

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not fuses(args[places[0][0]]):  # type: ignore[arg-type]
                return function(*args, **kwargs)
            # The marks go on new tensors; and whether one requires a gradient makes a difference to the compiler.
            given = [(x.view_as(x) if gradient else x.detach()) if isinstance(x, Tensor) else x for x in args]
            for place, dims in places:
                if place < len(given) and isinstance(x := given[place], Tensor):
                    for dim in dims:
                        torch._dynamo.maybe_mark_dynamic(x, dim)
            try:
                return _compiled(function, **compile_options())(*given, **kwargs)  # type: ignore[no-any-return]
            except torch._dynamo.exc.BackendCompilerFailed as error:
                reason = " ".join(str(error.inner_exception).split())
                warnings.warn(f"training goes on without fused kernels, as the compiler failed: {reason}", stacklevel=2)
                allow_fusion(False)
                return function(*args, **kwargs)

        return run

    return mark


def compile_options() -> dict[str, Any]:
    """Options of ``torch.compile``.

    The compiler times several forms of a sum and takes the fastest. Another process, or another rank, can take another
    one, which rounds differently; where PyTorch is asked for deterministic algorithms, the form is fixed.
    """
    return {"deterministic": torch.are_deterministic_algorithms_enabled()}


@cache
def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # A graph for each dtype and width that a draft has; the default, 8, is for a program with one of each.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def fuses(x: Tensor) -> bool:
    """Whether marked functions compile for ``x``: on a GPU, and of more rows than decoding has."""
    return _allowed and x.is_cuda and len(x) > 31 and not torch.is_inference_mode_enabled()
