"""Checks that exported and imported tensors are complete: servers silently skip names that they do not know."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles

_INIT_STD = 0.02
_ROWS = 4096  # of a matrix that are compared at a time


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, trained: bool = False
) -> None:
    """Reject tensors, in the precision of training, that a server would silently load as a broken draft.

    ``expected`` has a tensor of the right shape for every name. If the draft is known to be ``trained``, its weights
    need not show it.

    Raises:
        UserError: names the first tensor that is unknown, missing, not finite, all zeros or of the wrong shape; or
            reports that no tensor was trained.
    """
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{where}: tensor {unknown[0]} is unknown to the server, which would skip it silently")
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(f"{where}: tensor {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        if tensor.is_floating_point():
            _check_damage(name, tensor, where)
    if not (trained or _was_trained(tensors)):
        raise UserError(
            f"{where}: all norms are 1 and all matrices random, as initialised: the draft was not trained; train it "
            "with `specforge fit`, or export a checkpoint written after the first step"
        )
    _check_vocabulary(tensors, where)


def check_stored(name: str, tensor: Tensor, expected: Tensor, where: str) -> None:
    """Reject a stored tensor from which a draft cannot start.

    Raises:
        UserError: it has another shape or kind of number, is quantised, or is not finite.
    """
    if tensor.shape != expected.shape:
        raise UserError(f"{where}: tensor {name} is {tuple(tensor.shape)}, but the draft's is {tuple(expected.shape)}")
    weights = expected.is_floating_point()
    if weights != tensor.is_floating_point() or (weights and tensor.dtype.itemsize < 2):
        raise UserError(
            f"{where}: tensor {name} is {tensor.dtype}, but the draft's is {expected.dtype}; save it in bfloat16 or "
            "float32"
        )
    if weights and not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{where}: tensor {name} holds NaN or infinity")


def check_borrowed(tensors: Mapping[str, Tensor], target: TargetFiles, target_ids: Tensor, where: str) -> None:
    """Reject a draft whose copy of the target's embedding or head is not the target's, which SpecForge would use.

    Args:
        tensors: a folder's tensors that do not belong to the draft, under SpecForge's names.
        target: the target that the draft is loaded for.
        target_ids: ``[D]`` target id of every draft id.
        where: name of the folder, for error messages.

    Raises:
        UserError: they differ by more than the rounding of narrower dtypes.
    """
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name not in tensors:
            continue
        stored = tensors[name]
        own = target.embedding() if name == "embed_tokens.weight" else target.lm_head()[target_ids]
        if stored.shape != own.shape or not all(map(_close, stored.split(_ROWS), own.split(_ROWS))):
            raise UserError(
                f"{where}: tensor {name} is not that of {target.name}, which the draft would use here; name the target "
                "that it was trained for (drafts with a trained copy of their own are not supported)"
            )


def _close(stored: Tensor, own: Tensor) -> bool:
    return torch.allclose(stored.float(), own.float(), rtol=2**-7, atol=1e-6)


def _check_damage(name: str, tensor: Tensor, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{where}: tensor {name} holds NaN or infinity")
    if not bool(tensor.any()) and not name.endswith("bias"):
        raise UserError(f"{where}: tensor {name} is all zeros")


def _was_trained(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the draft was trained: the first optimizer step moves every norm away from 1, its initial value.

    Other projects may fold norms into the matrices, which then do not look freshly initialised.
    """
    weights = {name: x for name, x in tensors.items() if x.is_floating_point()}
    norms = [x for name, x in weights.items() if x.ndim == 1 and "norm" in name]
    if not norms or any(bool((x != 1).any()) for x in norms):
        return True
    return not all(_looks_random(x) for x in weights.values() if x.ndim == 2 and x.numel() >= 100_000)


def _looks_random(matrix: Tensor) -> bool:
    """Whether mean and standard deviation match the initialisation."""
    # The standard error of the standard deviation of n values is 1 / sqrt(2 n); training moves it much further.
    off = abs(float(matrix.double().std()) / _INIT_STD - 1)
    mean = abs(float(matrix.double().mean()))
    return off < 3 / (2 * matrix.numel()) ** 0.5 and mean < 3 * _INIT_STD / matrix.numel() ** 0.5


def target_ids(d2t: Tensor, size: int, vocab_size: int, where: str) -> Tensor:
    """Target id ``[D]`` of each draft id, from the offsets ``d2t``.

    Raises:
        UserError: the number of offsets is wrong, they are not integers, or the target ids do not ascend.
    """
    if d2t.shape != (size,):
        raise UserError(
            f"{where}: tensor d2t is {tuple(d2t.shape)}, but the draft vocabulary has {size} tokens "
            "(model.draft_config.draft_vocab_size)"
        )
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise UserError(f"{where}: tensor d2t is {d2t.dtype}, not integers")
    ids = torch.arange(size) + d2t.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size or bool((ids[1:] <= ids[:-1]).any()):
        raise UserError(f"{where}: d2t does not map draft ids to ascending target ids")
    return ids


def _check_vocabulary(tensors: Mapping[str, Tensor], where: str) -> None:
    d2t, t2d = tensors["d2t"], tensors["t2d"]
    ids = target_ids(d2t, len(d2t), len(t2d), where)
    if int(t2d.sum()) != len(d2t) or not bool(t2d[ids].all()):
        raise UserError(f"{where}: t2d marks other tokens than d2t maps to")
