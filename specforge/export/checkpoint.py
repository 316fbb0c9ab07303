"""Reading SpecForge's training checkpoints, without ever unpickling code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from specforge.errors import UserError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training checkpoint onto the CPU.

    Raises:
        UserError: the file is missing, damaged, holds pickled objects, or is not a SpecForge checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds pickled objects, which SpecForge never loads; a draft to start from is a folder with "
            "config.json and model.safetensors"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or "specforge" not in content or "state_dict" not in content:
        raise UserError(f"{path}: not a checkpoint of SpecForge's")
    return content
