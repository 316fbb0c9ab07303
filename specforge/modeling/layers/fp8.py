"""Matrix products in fp8, which Hopper GPUs compute at twice the rate of bf16.

Both factors of a product are cast to e4m3 with one scale per row of the left matrix and per column of the right one, so
that an outlier costs precision only in its own row. Products with a weight matrix are computed in this way, in the
forward pass and for the gradient of the input. Gradients of weights stay in the compute dtype: they are sums over all
rows of a batch, need the most precision, and would need a second, transposed cast of both factors.

A weight matrix is cast once per forward pass, from the current weights, for all rows, steps and the backward pass.

Shape legend: R rows, K columns of the input, O columns of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.errors import UserError
from specforge.fusion import fused

_E4M3, _LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
_MULTIPLE = 16  # of which the sizes of a matrix must be multiples


@fused(x=(0,))
def cast_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [R, K]`` in e4m3, and the scales ``[R, 1]`` in fp32 that its rows are to be multiplied by."""
    largest = x.abs().amax(1, keepdim=True).float()
    scale = largest.clamp(min=1e-30) / _LARGEST
    return (x.float() / scale).to(_E4M3).contiguous(), scale


def _multiply(x: Tensor, matrix: Tensor, scales: Tensor, fast: bool) -> Tensor:
    """``x @ matrixᵀ``, ``[R, O]`` for ``x [R, K]``; ``matrix [O, K]`` and ``scales [O, 1]`` are from cast_rows.

    With ``fast``, partial sums stay in the tensor cores, which keep fewer bits of them than fp32.
    """
    if not len(x):
        return x.new_empty(0, len(matrix))
    rows, row_scales = cast_rows(x)
    return torch._scaled_mm(rows, matrix.t(), row_scales, scales.t(), out_dtype=x.dtype, use_fast_accum=fast)


class Fp8Matrix:
    """A weight matrix ``[O, K]``, with copies in fp8 for the products with its rows and with its columns."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        with torch.no_grad():
            self.copies = (*cast_rows(weight), *cast_rows(weight.t().contiguous()))

    def __getitem__(self, rows: slice) -> Matrix:
        """Some of the rows."""
        return as_matrix(self.weight[rows], True)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        return self.weight.dtype


Matrix = Tensor | Fp8Matrix


def as_matrix(weight: Tensor, fp8: bool) -> Matrix:
    """``weight [O, K]`` for products in fp8, if asked for, possible and useful.

    It is not where no gradients are computed: validation and decoding multiply as a server does.
    """
    possible = weight.dtype == torch.bfloat16 and weight.numel() and not any(n % _MULTIPLE for n in weight.shape)
    return Fp8Matrix(weight) if fp8 and possible and torch.is_grad_enabled() else weight


def tensors(matrix: Matrix) -> tuple[Tensor, ...]:
    """Arguments of an autograd function: the matrix, which gets the gradient, and its fp8 copies if it has any."""
    return (matrix.weight, *matrix.copies) if isinstance(matrix, Fp8Matrix) else (matrix,)


def operands(matrix: Tensor, copies: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What :func:`times` and :func:`times_transposed` multiply by, given the :func:`tensors` of a matrix."""
    return (copies[:2], copies[2:]) if copies else ((matrix,), (matrix,))


def times(x: Tensor, operand: Sequence[Tensor]) -> Tensor:
    """``x @ matrixᵀ``, ``[R, O]`` for ``x [R, K]``."""
    return F.linear(x, operand[0]) if len(operand) == 1 else _multiply(x, operand[0], operand[1], fast=True)


def times_transposed(grad: Tensor, operand: Sequence[Tensor]) -> Tensor:
    """``grad @ matrix``, ``[R, K]`` for ``grad [R, O]``."""
    return grad @ operand[0] if len(operand) == 1 else _multiply(grad, operand[0], operand[1], fast=False)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, *copies: Tensor) -> Tensor:
        forward, backward = operands(matrix, copies)
        ctx.save_for_backward(x, *backward)
        return times(x, forward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *operand = ctx.saved_tensors
        grad_x = times_transposed(grad, operand) if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x, None, None, None, None


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x @ matrixᵀ + bias``, ``[R, O]`` for ``x [R, K]``."""
    if not isinstance(matrix, Fp8Matrix):
        return F.linear(x, matrix, bias)
    product: Tensor = _Linear.apply(x, *tensors(matrix))
    return product if bias is None else product + bias


def check_fp8(device: torch.device, precision: str) -> None:
    """Check that products in fp8 are possible.

    Raises:
        UserError: the device has none, or products are not in bf16 without them.
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device.type}"
        raise UserError(
            f"model.fp8: {what} has no fp8 products; they need an NVIDIA GPU of compute capability 8.9 or higher"
        )
    if "bf16" not in precision:
        raise UserError(f"model.fp8: trainer.precision is {precision}, but must be bf16-mixed")
