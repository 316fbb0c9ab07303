"""Weights in 8-bit floating point with one scale per block, the format of DeepSeek-V3 (arXiv 2412.19437).

A matrix is stored as float8_e4m3fn values, with its scales in ``<name>_scale_inv``: entry (i, j) multiplies the values
of block (i, j). Blocks at the right and lower edge may be smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
SCALE = "_scale_inv"

Block = tuple[int, int]


def dequantise(values: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Convert a matrix to fp32.

    Args:
        values: ``[R, C]`` float8_e4m3fn.
        scales: ``[ceil(R / r), ceil(C / c)]``.
        block: rows r and columns c of a block.

    Raises:
        ValueError: the shape of the scales does not match the blocks.
    """
    (rows, columns), (height, width) = values.shape, block
    grid = -(-rows // height), -(-columns // width)
    if scales.shape != grid:
        raise ValueError(
            f"{rows} x {columns} values in blocks of {height} x {width} have {grid[0]} x {grid[1]} scales, "
            f"not {tuple(scales.shape)}"
        )
    tall = scales.float().repeat_interleave(height, 0)[:rows]
    return values.float().mul_(tall.repeat_interleave(width, 1)[:, :columns])


def quantise(matrix: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Values and scales of a matrix ``[R, C]``; the largest value of each block maps to the format's maximum."""
    (rows, columns), (height, width) = matrix.shape, block
    padded = torch.nn.functional.pad(matrix.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / torch.finfo(FLOAT8).max, 1.0)
    values = (blocks / scales[:, None, :, None]).to(FLOAT8)
    return values.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scales
