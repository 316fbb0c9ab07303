"""Formats of draft folders in other projects: the base class of all families' formats.

Each family has a small subclass in its folder: the tensor names and config that other projects use, and its servers.
``hf`` is the usual form of published drafts. ``sglang`` and ``vllm`` are one form, right for every server that can
serve the draft; they differ in the server that must.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft, build_draft, config_fields, read_draft, save_draft
from specforge.modeling.draft.checks import check_tensors, target_ids
from specforge.modeling.draft.servers import VLLM, Server, SGLang
from specforge.modeling.draft.speculators import as_speculators, speculators_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class DraftFormat:
    """A draft's folder as other projects read and write it."""

    # prefixes of tensor names in other projects, and their replacements here; applied in this order
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    # names (as used here) of tensors in other projects' files that do not belong to the draft
    not_the_drafts: ClassVar[tuple[str, ...]] = ("embed_tokens.weight",)
    hf_embedding: ClassVar[bool] = False  # whether the hf form contains the target's embedding
    # what the servers make of such drafts; None in the formats of algorithms of which they know nothing
    vllm: ClassVar[VLLM | None] = None
    sglang: ClassVar[SGLang | None] = None
    drafted: ClassVar[int] = 4  # tokens per round in the printed commands, unless the draft has a number of its own

    def form(self, config: Mapping[str, Any], target: TargetFiles) -> str:
        """The name of the draft's form in the tables of its servers."""
        return str(config["architectures"][0])

    def tokens(self, draft: Draft) -> int:
        """Drafted tokens per round in the command that serves the draft."""
        return self.drafted

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """Fields of the written ``config.json``."""
        return {**config, **_rope_twice(config), "dtype": dtype, "torch_dtype": dtype}

    def build(self, config: Mapping[str, Any], where: str = "draft config") -> Draft:
        """The randomly initialised network of a ``config.json``."""
        return build_draft(config, where)

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The draft's tensors under their exported names.

        Without the vocabulary maps if the draft predicts the whole vocabulary: vLLM would refuse them.
        """
        maps = ("d2t", "t2d") if bool(state["t2d"].all()) else ()
        return {name: x for name, x in state.items() if name not in maps}

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """A folder's tensors under SpecForge's names, in fp32, with both vocabulary maps.

        Raises:
            UserError: two tensors are the same one, or the vocabulary map is missing, damaged or contradictory.
        """
        renamed = {
            name: tensor.float() if tensor.dtype.itemsize > 1 and tensor.is_floating_point() else tensor
            for name, tensor in self.named(tensors, where).items()
            if name not in self.not_the_drafts
        }
        vocab = config["vocab_size"]
        size = config.get("draft_vocab_size") or vocab
        if "d2t" not in renamed:
            if size != vocab:
                raise UserError(f"{where}: no tensor d2t, but the draft vocabulary is {size} of {vocab} tokens")
            renamed["d2t"] = torch.zeros(size, dtype=torch.int64)
        ids = target_ids(renamed["d2t"], size, vocab, where)
        renamed["d2t"] = renamed["d2t"].long()
        marks, own = renamed.get("t2d"), torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        if marks is not None and not (marks.shape == own.shape and torch.equal(marks.bool(), own)):
            raise UserError(f"{where}: t2d marks other tokens than d2t maps to")
        renamed["t2d"] = own
        return renamed

    def named(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """All tensors of a folder, as stored, under SpecForge's names.

        Raises:
            UserError: two of them have the same name.
        """
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            new = name
            for old, replacement in self.aliases:
                if new.startswith(old):
                    new = replacement + new.removeprefix(old)
            if new in renamed:
                raise UserError(f"{where}: tensor {name} is there twice, under two names of the same tensor")
            renamed[new] = tensor
        return renamed

    def to_hf(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """Write config.json and model.safetensors in the usual form of published drafts; no server is promised.

        Raises:
            UserError: the draft was never trained, is damaged, or does not fit the target.
        """
        self._write(draft, folder, dtype, self._published(draft, target, dtype))

    def to_sglang(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """Write a folder for SGLang's ``--speculative-draft-model-path``.

        Raises:
            UserError: the draft was never trained, is damaged, or would be loaded as a different network.
        """
        self._to_server(self.sglang, draft, target, folder, dtype)

    def to_vllm(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """Write a folder for ``model`` in vLLM's ``--speculative-config``.

        Raises:
            UserError: the draft was never trained, is damaged, or would be loaded as a different network.
        """
        self._to_server(self.vllm, draft, target, folder, dtype)

    def to_speculators(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """Write the form of the speculators project, which vLLM serves given the folder alone.

        Raises:
            UserError: the draft was never trained, is damaged, or would be loaded as a different network.
        """
        config = config_fields(draft)
        written = as_speculators(config, target, self.tokens(draft))
        if self.vllm is not None:
            self.vllm.check(self.form(config, target), config, target)
        self._write(draft, folder, dtype, self._published(draft, target, dtype), written)

    def _to_server(self, server: Server | None, draft: Draft, target: TargetFiles, folder: Path, dtype: str) -> None:
        config = config_fields(draft)
        if server is not None:
            server.check(self.form(config, target), config, target)
        self._write_served(draft, target, folder, dtype)

    def borrowed(self, draft: Draft, target: TargetFiles, dtype: str) -> dict[str, Tensor]:
        """Tensors of the target that the draft's folder must contain.

        Raises:
            UserError: a server could not use them.
        """
        return {}

    def _published(self, draft: Draft, target: TargetFiles, dtype: str) -> dict[str, Tensor]:
        """Tensors of the target in published drafts: those that must be there, and the embedding."""
        tensors = self.borrowed(draft, target, dtype)
        if self.hf_embedding and "embed_tokens.weight" not in draft.state_dict():
            tensors["embed_tokens.weight"] = target.embedding().to(DTYPES[dtype])
        return tensors

    def served(self, draft: Draft, target: TargetFiles, folder: Path) -> list[str]:
        """For each server what is known of the draft, and the command that serves it or the reason why none can."""
        config, lines = config_fields(draft), []
        for server in (self.vllm, self.sglang):
            if server is None:
                continue
            try:
                tested = server.check(self.form(config, target), config, target)
            except UserError as error:
                lines.append(f"not for {server.name}: {str(error).removeprefix('export: ')}")
                continue
            lines.append(f"for {server.name} (in tests with {server.version}, {tested.value}):")
            lines.append(f"  {server.command(target.name, folder, self.tokens(draft))}")
        return lines

    def _write_served(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str) -> None:
        self._write(draft, folder, dtype, self.borrowed(draft, target, dtype))

    def _write(
        self,
        draft: Draft,
        folder: Path,
        dtype: str,
        extra: dict[str, Tensor],
        speculators: dict[str, Any] | None = None,
    ) -> None:
        where = f"export to {folder}"
        state = {name: x.detach().cpu() for name, x in draft.state_dict().items()}
        config = config_fields(draft)
        check_tensors(state, self.build(config).state_dict(), where, draft.trained)
        state = {n: x.to(DTYPES[dtype]) if x.is_floating_point() else x for n, x in state.items()}
        tensors = {**self.tensors(state), **extra}
        if speculators is None:
            save_draft(self.config(config, dtype), tensors, folder)
        else:
            save_draft({**speculators, "dtype": dtype, "torch_dtype": dtype}, speculators_tensors(tensors), folder)
        self._read_back(folder, state)

    def _read_back(self, folder: Path, written: dict[str, Tensor]) -> None:
        """Parity probe: read the folder as any other draft's, and compare it with the network that was written."""
        config, tensors = read_draft(folder)
        again = self.build(config, str(folder))
        again.load_state_dict(self.read(config, tensors, str(folder)))
        for name, tensor in again.state_dict().items():
            if not torch.equal(tensor.to(written[name].dtype), written[name]):
                raise UserError(f"{folder}: tensor {name} is different when read back; this is a bug, please report it")


def _rope_twice(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE fields in the older form, too; a server may read either."""
    rope = dict(config.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return fields
