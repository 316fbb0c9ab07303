"""A decoder layer of a draft, from the bottom up: RMS norm, rotary positions, attention, MLP, layer.

A training-time test runs the same layer T times and keeps every step's activations until the backward pass, so peak
memory depends on what each operation saves. A normed input is one elementwise pass away from a tensor that is kept
anyway, so it is not saved. Neither are, unless asked for, the MLP's gate and up projections, the widest tensors of the
layer: one more matrix product recomputes them.

Names of parameters are those of Llama and Qwen.

Shape legend: R rows, P positions, H hidden size, O output width, I intermediate size, h / k query / key heads,
d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specforge.fusion import fused
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.fp8 import (
    Fp8Matrix,
    Matrix,
    as_matrix,
    linear,
    operands,
    tensors,
    times,
    times_transposed,
)
from specforge.modeling.layers.packed_attention import Segment

# Supported types of rotary positions. The angles of transformers' ``dynamic`` and ``longrope`` change with the length
# of the text: a document's angles would depend on its batch, and cached keys would become wrong as the text grows.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")

Angles = tuple[Tensor, Tensor]  # cosines and sines by row, each ``[R, rotary size / 2]`` in fp32


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of matrix products: the autocast dtype if autocast is on for the weight's device, else the weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


@fused(x=(0,))
def _rstd(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x²) + eps)``, ``[R, 1]`` in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)


@fused(x=(0,), rstd=(0,))
def _scale(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return (x.to(rstd.dtype) * rstd).mul_(weight).to(x.dtype)


@fused(grad=(0,), x=(0,), rstd=(0,), residual=(0,))
def _norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, need_x: bool, residual: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Gradients of a norm's input (None unless needed; plus ``residual``) and of its weight, in their dtypes."""
    wide = grad.to(rstd.dtype)
    normed = x.to(rstd.dtype) * rstd
    grad_weight = (wide * normed).sum(0).to(weight.dtype)
    if not need_x:
        return None, grad_weight
    scaled = wide * weight
    mean = torch.linalg.vecdot(scaled, normed).div_(x.shape[-1]).unsqueeze_(-1)
    grad_x = scaled.addcmul_(normed, mean, value=-1).mul_(rstd)
    return (grad_x if residual is None else grad_x.add_(residual)).to(x.dtype), grad_weight


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return _scale(x, rstd, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        return *_norm_backward(grad, x, rstd, weight, ctx.needs_input_grad[0]), None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, matrix: Tensor, *copies: Tensor) -> Tensor:
        rstd = _rstd(x, eps)
        forward, backward = operands(matrix, copies)
        ctx.save_for_backward(x, weight, rstd, *backward)
        return times(_scale(x, rstd, weight), forward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd, *operand = ctx.saved_tensors
        grad_matrix = grad.t() @ _scale(x, rstd, weight)
        grad_normed = times_transposed(grad, operand)
        grads = _norm_backward(grad_normed, x, rstd, weight, ctx.needs_input_grad[0])
        return *grads, None, grad_matrix, *[None] * 4  # of the fp8 copies, if there are any


@fused(projected=(0,))
def _swiglu(projected: Tensor) -> Tensor:
    """``silu(gate) · up`` of the projections ``[R, 2I]``."""
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@fused(projected=(0,), grad=(0,))
def _swiglu_backward(projected: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_swiglu` again, and the gradient of the projections ``[R, 2I]``, given that of the result."""
    gate, up = projected.chunk(2, dim=-1)
    activation = F.silu(gate)
    return activation * up, torch.cat([torch.ops.aten.silu_backward(grad * up, gate), activation * grad], dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        return _swiglu(projected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        return _swiglu_backward(projected, grad)[1]


def swiglu(projected: Tensor) -> Tensor:
    """``silu(gate) · up`` ``[R, I]`` of the projections ``[R, 2I]``, gate first (arXiv 2002.05202)."""
    return _SwiGLU.apply(projected)  # type: ignore[no-any-return]


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, keep: bool, gate_up: Tensor, down: Tensor, *copies: Tensor
    ) -> Tensor:
        rstd, out = _rstd(x, eps), torch.empty_like(x)
        (forward, backward), (down_forward, down_backward) = operands(gate_up, copies[:4]), operands(down, copies[4:])
        kept = []
        for rows in _blocks(x):
            projected = times(_scale(x[rows], rstd[rows], weight), forward)
            if copies:
                torch.add(x[rows], times(_swiglu(projected), down_forward), out=out[rows])
            else:
                torch.addmm(x[rows], _swiglu(projected), down.t(), out=out[rows])
            kept += [projected] if keep else []
        ctx.save_for_backward(x, weight, rstd, *forward, *backward, *down_backward, *kept)
        ctx.width = len(forward)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight, rstd, *saved), width = ctx.saved_tensors, ctx.width
        gate_up, gate_up_backward, down_backward = (saved[i * width : (i + 1) * width] for i in range(3))
        kept = saved[3 * width :]
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        grad_gate_up = x.new_empty(gate_up[0].shape)
        grad_down = x.new_empty(x.shape[1], len(grad_gate_up) // 2)
        for number, rows in enumerate(_blocks(x)):
            normed = _scale(x[rows], rstd[rows], weight)
            projected = kept[number] if kept else times(normed, gate_up)
            activation, projected = _swiglu_backward(projected, times_transposed(grad[rows], down_backward))
            torch.addmm(grad_down, grad[rows].t(), activation, beta=float(number > 0), out=grad_down)
            torch.addmm(grad_gate_up, projected.t(), normed, beta=float(number > 0), out=grad_gate_up)
            grad_normed = times_transposed(projected, gate_up_backward)
            part, part_weight = _norm_backward(grad_normed, x[rows], rstd[rows], weight, True, grad[rows])
            assert part is not None
            grad_x[rows] = part
            grad_weight += part_weight
        return grad_x, grad_weight, None, None, grad_gate_up, grad_down, *[None] * 8  # of the fp8 copies


def _blocks(x: Tensor) -> list[slice]:
    """At most four runs of rows; the MLP's widest tensors exist for one run at a time.

    More runs would lose precision: the gradients of the matrices are summed over them in the compute dtype.
    """
    least = 256 if x.device.type == "cpu" else 8192
    size = max(least, -(-len(x) // 4))
    return [slice(start, start + size) for start in range(0, max(1, len(x)), size)]  # without rows, gradients of 0


class RMSNorm(nn.Module):
    """Root-mean-square norm, ``x / sqrt(mean(x²) + eps) * weight``, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of ``x [R, H]``; the result has the dtype of ``x``."""
        return _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """``norm(x) @ matrixᵀ`` for ``x [R, H]``, ``matrix [O, H]`` of the same dtype, without keeping ``norm(x)``."""
        return _NormLinear.apply(x, self.weight, self.eps, *tensors(matrix))  # type: ignore[no-any-return]

    def mlp(self, x: Tensor, gate_up: Matrix, down: Matrix, keep: bool = False) -> Tensor:
        """``x + down(silu(gate) · up)`` of the normed rows (SwiGLU, arXiv 2002.05202).

        Args:
            x: ``[R, H]``.
            gate_up: ``[2I, H]`` gate and up matrices, gate first; in fp8 if ``down`` is.
            down: ``[H, I]``.
            keep: whether to keep the projections ``[R, 2I]`` for the backward pass instead of computing them again.
        """
        (first, *more), (second, *others) = tensors(gate_up), tensors(down)
        return _NormMLP.apply(x, self.weight, self.eps, keep, first, second, *more, *others)  # type: ignore[no-any-return]


def norm_heads(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """``x [R, h, d]`` with every head normed; unchanged without a norm."""
    return x if norm is None else norm(x.flatten(0, 1)).view(x.shape)


class RotaryTable:
    """Cosines and sines by position, from transformers' own initialisation of ``config.rope_parameters``.

    Not a module: its frequencies stay in fp32 when a draft is cast to a narrower dtype.

    Args:
        config: a transformers config with ``rope_parameters``, ``head_dim`` and ``max_position_embeddings``. Of a head,
            the first ``head_dim * partial_rotary_factor`` dimensions are rotated.

    Raises:
        ValueError: more dimensions are rotated than a head has.
    """

    def __init__(self, config: Any) -> None:
        self._frequencies, self._factor = _frequencies(config)
        if 2 * len(self._frequencies) > config.head_dim:
            raise ValueError(f"head_dim is {config.head_dim}, but must be even: dimensions are rotated in pairs")

    def __eq__(self, other: object) -> bool:
        """Whether the angles are the same."""
        if not isinstance(other, RotaryTable):
            return NotImplemented
        return self._factor == other._factor and torch.equal(self._frequencies.cpu(), other._frequencies.cpu())

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions ``0 .. length - 1``: cosine and sine, both fp32 ``[P, rotary size / 2]``."""
        positions = torch.arange(length, device=device, dtype=torch.float32)
        if self._frequencies.device != device:  # once: a copy from the host makes it wait for the device
            self._frequencies = self._frequencies.to(device)
        angles = positions[:, None] * self._frequencies
        return angles.cos() * self._factor, angles.sin() * self._factor


def _frequencies(config: Any) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, and the factor of cosine and sine."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    with torch.device("cpu"):
        if kind == "default":  # transformers repeats this one in every model's file
            size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
            return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type is {kind!r}; drafts support {', '.join(ROPE_TYPES)}")
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
        return frequencies, float(factor)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


@fused(x=(0,), cos=(0,), sin=(0,))
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [R, h, d]`` by the angles of ``cos, sin [R, rotary size / 2]`` (RoFormer, arXiv 2104.09864, eq. 34).

    The rotated dimensions pair ``i`` with ``i + rotary size / 2`` (the layout of Llama and NeoX); dimensions beyond
    the rotary size are passed through. The result has the dtype of ``x``.
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_add_(0, index, grad), None


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, for an index that repeats only rows without a gradient.

    On a GPU the ordinary backward pass sorts the index, to add repeated rows in a fixed order.
    """
    return _TakeRows.apply(x, index) if x.is_cuda else x[index]  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Interface of an attention: projections of the layer's input, and the heads that their products make."""

    heads: int  # h
    kv_heads: int  # k
    head_dim: int  # d, of queries and keys
    value_dim: int  # v
    query_width: int  # columns of the input product that make the queries; they come first
    o_proj: nn.Linear  # output projection, from h v to H

    @abstractmethod
    def inputs(self) -> list[nn.Linear]:
        """The projections of the layer's input, those of the queries first."""

    def more(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Further matrices that make the heads, in the compute dtype."""
        return ()

    @abstractmethod
    def queries(self, product: Tensor, angles: Angles | None, more: tuple[Matrix, ...]) -> Tensor:
        """Queries ``[R, h, d]`` from the first ``query_width`` columns; without ``angles``, not yet rotated."""

    @abstractmethod
    def keys_values(self, product: Tensor, angles: Angles | None, more: tuple[Matrix, ...]) -> tuple[Tensor, Tensor]:
        """Keys ``[R, k, d]`` and values ``[R, k, v]`` from the other columns; without ``angles``, not yet rotated."""


def rotated(x: Tensor, angles: Angles | None) -> Tensor:
    """:func:`apply_rope` where there are angles."""
    return x if angles is None else apply_rope(x, *angles)


class GroupedAttention(Attention):
    """Grouped-query attention.

    Args:
        config: sizes; ``attention_bias`` (biases of the query, key and value projections) and ``qk_norm`` (norms of
            query and key heads).
        width: width of the layer's input to the projections; H by default.
        out_bias: whether ``attention_bias`` also applies to the output projection.
        qk_norm: value of ``qk_norm`` if the config has none.

    Raises:
        ValueError: the number of query heads is not a multiple of the number of key heads.
    """

    def __init__(self, config: Any, width: int | None = None, out_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, {kv_heads}")
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim = self.value_dim = config.head_dim
        self.query_width = heads * self.head_dim
        width, bias = width or hidden, bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(width, self.query_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.query_width, hidden, bias=bias and out_bias)
        normed = getattr(config, "qk_norm", qk_norm)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None

    def inputs(self) -> list[nn.Linear]:
        """Query, key and value projections."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def queries(self, product: Tensor, angles: Angles | None, more: tuple[Matrix, ...]) -> Tensor:
        """``[R, h, d]``."""
        return rotated(norm_heads(self.q_norm, product.unflatten(1, (self.heads, self.head_dim))), angles)

    def keys_values(self, product: Tensor, angles: Angles | None, more: tuple[Matrix, ...]) -> tuple[Tensor, Tensor]:
        """``[R, k, d]`` each."""
        key, value = product.unflatten(1, (-1, self.head_dim)).chunk(2, dim=1)
        # The contiguous copy frees the whole product; the values are only its last third.
        return rotated(norm_heads(self.k_norm, key), angles), value.contiguous()


class SwiGLUMLP(nn.Module):
    """Gated MLP, ``down(silu(gate x) · up x)`` (arXiv 2002.05202).

    Attributes:
        keeps_projections: whether training keeps the gate and up projections instead of computing them again.
        fp8: whether training multiplies in fp8.
    """

    keeps_projections: bool = False
    fp8: bool = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def weights(self, dtype: torch.dtype) -> dict[str, Matrix]:
        """The matrices in the compute dtype, gate and up concatenated."""
        gate_up = torch.cat([self.gate_proj.weight.to(dtype), self.up_proj.weight.to(dtype)])
        down = as_matrix(self.down_proj.weight.to(dtype), self.fp8)
        return {"gate_up": as_matrix(gate_up, isinstance(down, Fp8Matrix)), "down": down}

    def residual(self, x: Tensor, norm: RMSNorm, weights: dict[str, Matrix]) -> Tensor:
        """``x + MLP(norm(x))`` for ``x [R, H]`` and this MLP's :meth:`weights`."""
        return norm.mlp(x, **weights, keep=self.keeps_projections)


class LayerWeights(NamedTuple):
    """A layer's matrices in the compute dtype; cast and concatenated once for all rows and steps of a pass."""

    embed: Matrix  # columns of the attention's input projections that read the embedding; none in an ordinary layer
    hidden: Matrix  # columns that read the hidden state
    bias: Tensor | None  # biases of the input projections, or None
    more: tuple[Matrix, ...]  # further matrices of the attention
    out: Matrix
    out_bias: Tensor | None  # its bias, or None
    mlp: dict[str, Matrix]  # matrices of the MLP


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer; if its attention's input is wider than H, it also reads a token embedding (EAGLE-3).

    Args:
        config: ``hidden_size``, ``rms_norm_eps``, sizes of the MLP; and, for a layer that reads an embedding, optional
            ``norm_before_residual`` (the attention's output is added to the normed state instead of the state).
        attention: the attention.
        mlp: a module with the methods of :class:`SwiGLUMLP`, which is the default.

    Attributes:
        fp8: whether training multiplies by the attention's matrices in fp8.
    """

    self_attn: Any
    mlp: Any
    fp8: bool = False

    def __init__(self, config: Any, attention: Attention, mlp: nn.Module | None = None) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.reads_embedding = attention.inputs()[0].in_features > size
        if self.reads_embedding:
            self.hidden_norm = RMSNorm(size, eps)
        self.norm_before_residual = self.reads_embedding and bool(getattr(config, "norm_before_residual", False))
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.self_attn = attention
        self.mlp = SwiGLUMLP(config) if mlp is None else mlp

    @property
    def state_norm(self) -> RMSNorm:
        """The norm of the hidden state."""
        return self.hidden_norm if self.reads_embedding else self.input_layernorm

    def weights(self, dtype: torch.dtype) -> LayerWeights:
        """Cast and concatenate the layer's matrices."""
        attn = self.self_attn
        inputs = torch.cat([p.weight.to(dtype) for p in attn.inputs()])
        biases = [p.bias.to(dtype) for p in attn.inputs() if p.bias is not None]
        split = inputs.shape[1] - attn.o_proj.out_features
        return LayerWeights(
            embed=as_matrix(inputs[:, :split], self.fp8),
            hidden=as_matrix(inputs[:, split:], self.fp8),
            bias=torch.cat(biases) if biases else None,
            more=tuple(as_matrix(x, self.fp8) for x in attn.more(dtype)),
            out=as_matrix(attn.o_proj.weight.to(dtype), self.fp8),
            out_bias=None if attn.o_proj.bias is None else attn.o_proj.bias.to(dtype),
            mlp=self.mlp.weights(dtype),
        )

    def project_embedding(self, embeds: Tensor, w: LayerWeights) -> Tensor:
        """Input products ``[R, O]`` of token embeddings ``[R, H]``, biases included."""
        product = self.input_layernorm.linear(embeds, w.embed)
        return product if w.bias is None else product + w.bias

    def project(self, hidden: Tensor, w: LayerWeights) -> Tensor:
        """Input products ``[R, O]`` of hidden states ``[R, H]`` alone, biases included."""
        product = self.state_norm.linear(hidden, w.hidden)
        return product if w.bias is None else product + w.bias

    def attention_heads(self, product: Tensor, angles: Angles | None, w: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[R, h, d]``, keys ``[R, k, d]`` and values ``[R, k, v]`` of input products ``[R, O]``."""
        attn = self.self_attn
        query = attn.queries(product[:, : attn.query_width], angles, w.more)
        return query, *attn.keys_values(product[:, attn.query_width :], angles, w.more)

    def finish(self, hidden: Tensor, attention: Tensor, w: LayerWeights) -> Tensor:
        """Output projection, residual and MLP: ``hidden [R, H]``, ``attention [R, h, v]`` to ``[R, H]``."""
        if self.norm_before_residual:
            hidden = self.hidden_norm(hidden)
        hidden = hidden + linear(attention.flatten(1), w.out, w.out_bias)
        return self.mlp.residual(hidden, self.post_attention_layernorm, w.mlp)  # type: ignore[no-any-return]

    def run(self, states: Tensor, rotary: RotaryTable) -> Tensor:
        """The layer's output for the hidden states ``[R, H]`` of one text, with embeddings of zero."""
        w = self.weights(states.dtype)
        heads = self.attention_heads(self.project(states, w), rotary(len(states), states.device), w)
        return self.finish(states, ttt_attention(*heads, [Segment(0, 0, len(states), 0)], []), w)
