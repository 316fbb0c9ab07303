"""Norm, projection and MLP of the draft layers, as autograd functions that keep only what cannot be recomputed cheaply.

A training-time test runs the same layer T times and holds every step until the backward pass, so what each
op saves decides the peak memory. A normed input is one elementwise pass away from a tensor that is kept
anyway, so it is not saved; nor are the MLP's gate and up projections, the widest tensors of the layer: one
more product computes them again (5 % of a step's time for a quarter of its activations).

Shape legend: R rows, H hidden size, O output width, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype to multiply in: the autocast dtype where autocast is on for the weight's device, else the weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def norm_heads(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """``x [R, h, d]`` with every head normed; as it is without a norm."""
    return x if norm is None else norm(x.flatten(0, 1)).view(x.shape)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x²) + eps)``, ``[R, 1]`` in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)


def _scale(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return (x.to(rstd.dtype) * rstd).mul_(weight).to(x.dtype)


def _norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of a norm's input (None unless needed; in the dtype of ``rstd``) and of its weight."""
    wide = grad.to(rstd.dtype)
    normed = x.to(rstd.dtype) * rstd
    grad_weight = (wide * normed).sum(0).to(weight.dtype)
    if not need_x:
        return None, grad_weight
    scaled = wide * weight
    mean = torch.linalg.vecdot(scaled, normed).div_(x.shape[-1]).unsqueeze_(-1)
    return scaled.addcmul_(normed, mean, value=-1).mul_(rstd), grad_weight


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return _scale(x, rstd, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(grad, x, rstd, weight, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, matrix: Tensor) -> Tensor:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd, matrix)
        return F.linear(_scale(x, rstd, weight), matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd, matrix = ctx.saved_tensors
        grad_matrix = grad.t() @ _scale(x, rstd, weight)
        grad_x, grad_weight = _norm_backward(grad @ matrix, x, rstd, weight, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None, grad_matrix


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate_up: Tensor, down: Tensor) -> Tensor:
        rstd, out = _rstd(x, eps), torch.empty_like(x)
        for rows in _blocks(x):
            gate, up = F.linear(_scale(x[rows], rstd[rows], weight), gate_up).chunk(2, dim=-1)
            torch.addmm(x[rows], F.silu(gate).mul_(up), down.t(), out=out[rows])
        ctx.save_for_backward(x, weight, rstd, gate_up, down)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd, gate_up, down = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_gate_up, grad_down = (torch.zeros_like(w) for w in (weight, gate_up, down))
        for rows in _blocks(x):
            normed = _scale(x[rows], rstd[rows], weight)
            projected = F.linear(normed, gate_up)
            gate, up = projected.chunk(2, dim=-1)
            activation, grad_product = F.silu(gate), grad[rows] @ down
            grad_down.addmm_(grad[rows].t(), activation * up)
            # From here on `projected` becomes its own gradient, half by half.
            activation.mul_(grad_product)
            grad_product.mul_(up)
            up.copy_(activation)
            torch.ops.aten.silu_backward.grad_input(grad_product, gate, grad_input=gate)
            grad_gate_up.addmm_(projected.t(), normed)
            part, part_weight = _norm_backward(projected @ gate_up, x[rows], rstd[rows], weight, need_x=True)
            assert part is not None
            torch.add(part, grad[rows], out=grad_x[rows])
            grad_weight += part_weight
        return grad_x, grad_weight, None, grad_gate_up, grad_down


def _blocks(x: Tensor) -> list[slice]:
    """At most four runs of the rows: the MLP's widest tensors exist for one at a time.

    Not more, because the gradients of the matrices are summed over them in the compute dtype.
    """
    least = 256 if x.device.type == "cpu" else 4096
    size = max(least, -(-len(x) // 4))
    return [slice(start, start + size) for start in range(0, len(x), size)]


class RMSNorm(nn.Module):
    """Root-mean-square norm, ``x / sqrt(mean(x²) + eps) * weight``, computed in fp32 (arXiv 1910.07467).

    Args:
        size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of ``x [R, H]``; the result has the dtype of ``x``."""
        return _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``norm(x) @ matrixᵀ`` for ``x [R, H]``, ``matrix [O, H]`` of the same dtype, without keeping ``norm(x)``."""
        return _NormLinear.apply(x, self.weight, self.eps, matrix)  # type: ignore[no-any-return]

    def mlp(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """``x + down(silu(gate) · up)`` of the normed rows (SwiGLU, arXiv 2002.05202), keeping only ``x``.

        Args:
            x: ``[R, H]``.
            gate_up: ``[2I, H]`` gate and up matrices, gate first.
            down: ``[H, I]``.
        """
        return _NormMLP.apply(x, self.weight, self.eps, gate_up, down)  # type: ignore[no-any-return]
