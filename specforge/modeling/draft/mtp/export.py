"""MTP weights in a target's checkpoint: reading them, and writing a trained module back under the family's names.

Servers read an MTP module from the target's own folder, so the form that they serve is a copy of the target with its
module replaced by the trained one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.errors import UserError
from specforge.files import staged_folder
from specforge.inference.float8_blocks import SCALE, quantise
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft
from specforge.modeling.draft.checks import check_tensors
from specforge.modeling.draft.format import DTYPES, DraftFormat
from specforge.modeling.draft.mtp.network import MTPDraft
from specforge.modeling.draft.servers import VLLM, Proof, SGLang

_DEEPSEEK, _QWEN, _MIMO = "DeepSeek NextN", "Qwen MTP", "MiMo"
_NO_PLAIN = "has Qwen MTP modules with experts or gated attention only; this one has neither; use --to hf"


@dataclass(frozen=True)
class MTPFamily:
    """Names of the first MTP module in a family of targets."""

    name: str  # name of the family, for messages
    prefix: str  # prefix of its tensors' names
    # SpecForge's name of each tensor outside the decoder layer, by the family's name without the prefix
    names: Mapping[str, str]
    layer: str = ""  # prefix of the layer's tensors, after prefix
    hidden_first: bool = False  # whether the projection's first columns read the hidden state instead of the embedding
    # copies of the embedding and the head
    skipped: tuple[str, ...] = ("embed_tokens.weight", "shared_head.head.weight")
    mask_first: tuple[str, ...] = ()  # the servers in which the first row reads no embedding


def _families(target: TargetFiles) -> tuple[MTPFamily, ...]:
    def parts(embed: str, hidden: str, proj: str, norm: str) -> dict[str, str]:
        mine = ("embed_norm.weight", "hidden_norm.weight", "proj.weight", "norm.weight")
        return {f"{n}.weight": m for n, m in zip((embed, hidden, proj, norm), mine, strict=True)}

    deepseek = parts("enorm", "hnorm", "eh_proj", "shared_head.norm")
    qwen = parts("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    mimo = parts("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    return (
        MTPFamily(_DEEPSEEK, f"model.layers.{target.num_layers}.", deepseek, mask_first=(VLLM.name,)),
        MTPFamily(_QWEN, "mtp.", qwen, layer="layers.0."),
        MTPFamily(_MIMO, "model.mtp_layers.0.", mimo, hidden_first=True, mask_first=(VLLM.name, SGLang.name)),
    )


def mtp_family(target: TargetFiles) -> MTPFamily | None:
    """The family of the target's MTP weights, recognised by their names; None if it has none."""
    for family in _families(target):
        if all(family.prefix + name in target.weight_files for name in family.names):
            return family
    return None


def mtp_tensors(target: TargetFiles) -> dict[str, Tensor]:
    """The tensors of the target's MTP module under SpecForge's names.

    Raises:
        UserError: the target has no MTP module, or it is quantised in an unsupported form.
    """
    family = require_mtp(target)
    found: dict[str, Tensor] = {}
    for full in target.weight_files:
        name = full.removeprefix(family.prefix)
        if name == full or name in family.skipped or name.endswith(SCALE):
            continue
        mine = family.names.get(name) or f"layer.{name.removeprefix(family.layer)}"
        found[mine] = (
            _swap(target.tensor(full)) if family.hidden_first and mine == "proj.weight" else target.tensor(full)
        )
    return found


def require_mtp(target: TargetFiles) -> MTPFamily:
    """The family of the target's MTP weights.

    Raises:
        UserError: the target has no MTP weights.
    """
    family = mtp_family(target)
    if family is None:
        looked = ", ".join(f"{f.prefix}{next(iter(f.names))}" for f in _families(target))
        raise UserError(f"{target.name} has no MTP weights of its own (looked for {looked})")
    return family


def _in_family_form(family: MTPFamily, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors under the family's names and with the family's order of columns."""
    theirs = {mine: family.prefix + name for name, mine in family.names.items()}
    return {
        theirs.get(n) or family.prefix + family.layer + n.removeprefix("layer."): (
            _swap(x) if family.hidden_first and n == "proj.weight" else x
        )
        for n, x in state.items()
    }


def _swap(proj: Tensor) -> Tensor:
    first, second = proj.chunk(2, dim=1)
    return torch.cat([second, first], dim=1)


def _check_module(config: Mapping[str, Any], target: TargetFiles, server: str) -> None:
    if not config.get("norm_output", True):
        raise UserError(f"export: norm_output is off, but {server} feeds back the normed output; use --to hf")
    family = require_mtp(target)
    mine, theirs = bool(config.get("mask_first")), server in family.mask_first
    if mine != theirs:
        raise UserError(
            f"export: mask_first is {mine}, but {server}'s {family.name} module has {theirs}; train with "
            f"model.draft_config.mask_first {str(theirs).lower()}, or use --to hf"
        )


class MTPFormat(DraftFormat):
    """``hf`` is the module under SpecForge's names; servers read the target with the module inside."""

    vllm = VLLM("mtp", {_DEEPSEEK: Proof.SERVED, _QWEN: _NO_PLAIN, _MIMO: Proof.SERVED}, _check_module, in_target=True)
    sglang = SGLang(
        "NEXTN",
        {_DEEPSEEK: Proof.SERVED, _QWEN: _NO_PLAIN, _MIMO: Proof.SERVED},
        _check_module,
        in_target=True,
        chain=True,
    )
    drafted = 3

    def form(self, config: Mapping[str, Any], target: TargetFiles) -> str:
        """The target's family."""
        return require_mtp(target).name

    def _write_served(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str) -> None:
        """Write a copy of the target with the trained MTP weights; every file keeps the names of its tensors.

        Tensors that the target stores as 8-bit blocks are written as such.

        Raises:
            UserError: the target lacks one of the tensors, the draft is untrained or damaged, or the folder is not
                empty.
        """
        assert isinstance(draft, MTPDraft)
        family = require_mtp(target)
        check_tensors(draft.state_dict(), draft.state_dict(), f"export to {folder}", draft.trained)
        renamed = _in_family_form(family, draft.module_tensors(DTYPES[dtype]))
        unknown = sorted(set(renamed) - set(target.weight_files))
        if unknown:
            raise UserError(f"export: {target.name} has no tensor {unknown[0]}; its server would skip it silently")
        if target.weight_block is not None:
            wide = _in_family_form(family, draft.module_tensors(torch.float32))
            for name in [n for n in renamed if n + SCALE in target.weight_files]:
                renamed[name], renamed[name + SCALE] = quantise(wide[name], target.weight_block)
        _copy_target(target, folder, renamed)


def _copy_target(target: TargetFiles, folder: Path, replaced: Mapping[str, Tensor]) -> None:
    """Copy the target's folder file by file, with some tensors replaced; it appears complete or not at all."""
    rewritten = {target.weight_files[name].name for name in replaced}
    with staged_folder(folder) as staging:
        for path in sorted(p for p in target.folder.iterdir() if p.is_file()):
            if path.name not in rewritten:
                shutil.copyfile(path, staging / path.name)
                continue
            tensors = load_file(path)
            tensors |= {n: x.contiguous() for n, x in replaced.items() if n in tensors}
            save_file(tensors, staging / path.name, metadata={"format": "pt"})
